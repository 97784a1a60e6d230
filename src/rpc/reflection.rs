//! gRPC reflection (v1): what a port serves, for tools such as grpcurl.
//!
//! Each port tells of its own services: the main port of the contract, to those who have the token; the health port of
//! `grpc.health.v1`, to everybody.

use tonic_reflection::server::Builder;
use tonic_reflection::server::v1::{ServerReflection, ServerReflectionServer};

/// Of the contract.
pub(super) fn of_contract() -> ServerReflectionServer<impl ServerReflection> {
    Builder::configure()
        .register_encoded_file_descriptor_set(weightcast_proto::DESCRIPTORS)
        .build_v1()
        .expect("the descriptors are generated with the code, and tests/health.rs reads them")
}

/// Of the health service.
pub(super) fn of_health() -> ServerReflectionServer<impl ServerReflection> {
    Builder::configure()
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptors come with the crate, and tests/health.rs reads them")
}
