//! The gRPC contract: messages, clients and servers generated from `weightcast/v1/*.proto`.
//!
//! The generated code is committed, so that a build needs no protoc; `tests/generated.rs` generates it again in memory
//! and compares. To change the contract, edit the `.proto` files and run
//! `WEIGHTCAST_UPDATE_PROTO=1 cargo test -p weightcast-proto`.

/// Version 1 of the contract.
pub mod v1 {
    #![expect(missing_docs, reason = "the .proto files carry the documentation")]
    #![expect(clippy::all, reason = "generated code")]
    include!("gen/weightcast.v1.rs");
}

/// The serialized `FileDescriptorSet` of the contract, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!("gen/descriptors.bin");

/// The version of the protocol between ranks and coordinator; both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 2;
