//! How two ranks find out that they belong together.
//!
//! Owns: the messages of the handshake and both sides' state machines over non-blocking sockets.
//! Refuses to know: frames, collectives, who dials whom.
//!
//! The dialer says who it is; the acceptor refuses with a code or answers with a proof that it knows the generation's
//! secret; the dialer checks it and proves the same. Both proofs are HMAC-SHA256 over a label for the side, everything
//! the dialer said, and a nonce of either side, so that neither can be replayed or reflected.
//! The secret keeps strangers and stale ranks out; the frames that follow carry checksums, not signatures. In TLS the proofs
//! are over a secret of the session too, so that nobody who has a certificate can stand between two ranks and pass them on.
//!
//! `CM-5`: all messages have a fixed length.

use std::fmt;
use std::io::{self, IoSlice};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::pipe::{BINDING_BYTES, Pipe};
use crate::comm::{Group, Refusal};
use crate::types::{Generation, Rank};

/// The version of handshake and frames together.
const PROTOCOL_VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"WCASTTCP";
const NONCE_BYTES: usize = 32;
const PROOF_BYTES: usize = 32;
/// Magic, version, generation, dialer's rank, acceptor's rank, world size, nonce.
const HELLO_BYTES: usize = 8 + 4 + 8 + 4 + 4 + 4 + NONCE_BYTES;
/// Code, detail, nonce, proof.
const ANSWER_BYTES: usize = 4 + 8 + NONCE_BYTES + PROOF_BYTES;

const DIALER: &[u8] = b"weightcast tcp dialer 1";
const ACCEPTOR: &[u8] = b"weightcast tcp acceptor 1";

/// What a rank says, and keeps to itself, about who it is.
#[derive(Clone)]
pub(super) struct Identity {
    pub(super) group: Group,
    pub(super) generation: Generation,
    pub(super) secret: [u8; 32],
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { group, generation, secret: _ } = self;
        f.debug_struct("Identity").field("group", group).field("generation", generation).finish_non_exhaustive()
    }
}

/// Why a handshake did not come to its end.
#[derive(Debug)]
pub(super) enum HandshakeError {
    /// The connection broke.
    Io(io::Error),
    /// The other side does not belong to us, or says that we do not belong to it.
    Refused(Refusal),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What a handshake waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wants {
    /// Bytes from the other side.
    Read,
    /// Room for bytes, or the end of connecting.
    Write,
}

/// The outcome of a step.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step<T> {
    /// Nothing more can be done now.
    Blocked(Wants),
    /// The handshake succeeded.
    Done(T),
}

/// A message of fixed length on its way.
#[derive(Debug)]
struct Message<const N: usize> {
    bytes: [u8; N],
    done: usize,
}

impl<const N: usize> Message<N> {
    const fn new(bytes: [u8; N]) -> Self {
        Self { bytes, done: 0 }
    }

    /// Whether all bytes are there now.
    fn read(&mut self, stream: &Pipe) -> io::Result<bool> {
        while self.done < N {
            match stream.read(&mut self.bytes[self.done..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.done += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Whether all bytes are sent now.
    fn write(&mut self, stream: &Pipe) -> io::Result<bool> {
        while self.done < N {
            match stream.send(&[IoSlice::new(&self.bytes[self.done..])]) {
                Ok(count) => self.done += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        match stream.flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            flushed => flushed.map(|()| true),
        }
    }
}

/// The dialer's side.
#[derive(Debug)]
pub(super) struct Dial {
    to: Rank,
    hello: [u8; HELLO_BYTES],
    stage: DialStage,
}

#[derive(Debug)]
enum DialStage {
    Connecting,
    Encrypting,
    Hello(Message<HELLO_BYTES>),
    Answer(Message<ANSWER_BYTES>),
    Proof(Message<PROOF_BYTES>),
}

impl Dial {
    /// A dial of rank `to` on a socket that is connecting.
    pub(super) fn new(identity: &Identity, to: Rank) -> io::Result<Self> {
        let Identity { group, generation, .. } = identity;
        let mut hello = Vec::with_capacity(HELLO_BYTES);
        hello.extend(MAGIC);
        hello.extend(PROTOCOL_VERSION.to_le_bytes());
        hello.extend(generation.0.to_le_bytes());
        hello.extend(group.rank.0.to_le_bytes());
        hello.extend(to.0.to_le_bytes());
        hello.extend(group.world.get().to_le_bytes());
        hello.extend(nonce()?);
        let hello = hello.try_into().expect("the fields above have HELLO_BYTES together");
        Ok(Self { to, hello, stage: DialStage::Connecting })
    }

    /// Whether there is no connection yet.
    pub(super) const fn is_connecting(&self) -> bool {
        matches!(self.stage, DialStage::Connecting)
    }

    /// Goes as far as the socket allows.
    pub(super) fn advance(&mut self, stream: &Pipe, identity: &Identity) -> Result<Step<()>, HandshakeError> {
        loop {
            match &mut self.stage {
                DialStage::Connecting => {
                    if let Some(error) = stream.take_error()? {
                        return Err(error.into());
                    }
                    match stream.peer_addr() {
                        Ok(_) => self.stage = DialStage::Encrypting,
                        Err(error) if error.kind() == io::ErrorKind::NotConnected => {
                            return Ok(Step::Blocked(Wants::Write));
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                DialStage::Encrypting => match stream.shake_hands()? {
                    Some(wants) => return Ok(Step::Blocked(wants)),
                    None => self.stage = DialStage::Hello(Message::new(self.hello)),
                },
                DialStage::Hello(message) => {
                    if !message.write(stream)? {
                        return Ok(Step::Blocked(Wants::Write));
                    }
                    self.stage = DialStage::Answer(Message::new([0; ANSWER_BYTES]));
                }
                DialStage::Answer(message) => {
                    if !message.read(stream)? {
                        return Ok(Step::Blocked(Wants::Read));
                    }
                    let answer = message.bytes;
                    let proof = self.check_answer(&answer, identity, &stream.binding()?)?;
                    self.stage = DialStage::Proof(Message::new(proof));
                }
                DialStage::Proof(message) => {
                    let sent = message.write(stream)?;
                    return Ok(if sent { Step::Done(()) } else { Step::Blocked(Wants::Write) });
                }
            }
        }
    }

    /// Checks the acceptor's proof and gives ours.
    fn check_answer(
        &self,
        answer: &[u8; ANSWER_BYTES],
        identity: &Identity,
        binding: &Binding,
    ) -> Result<[u8; PROOF_BYTES], HandshakeError> {
        let mut fields = Fields(answer);
        let (code, detail) = (fields.u32(), fields.u64());
        let nonce = fields.take::<NONCE_BYTES>();
        let theirs: [u8; PROOF_BYTES] = fields.take();
        if let Some(refusal) = refusal_of(code, detail, identity, self.to) {
            return Err(HandshakeError::Refused(refusal));
        }
        mac(identity, ACCEPTOR, [&self.hello, &nonce, binding])
            .verify_slice(&theirs)
            .map_err(|_| HandshakeError::Refused(Refusal::Secret))?;
        Ok(mac(identity, DIALER, [&self.hello, &nonce, binding]).finalize().into_bytes().into())
    }
}

/// The acceptor's side.
#[derive(Debug)]
pub(super) struct Answer {
    hello: [u8; HELLO_BYTES],
    nonce: [u8; NONCE_BYTES],
    stage: AnswerStage,
}

#[derive(Debug)]
enum AnswerStage {
    Encrypting,
    Hello(Message<HELLO_BYTES>),
    Answer(Message<ANSWER_BYTES>, Option<Refusal>),
    Proof(Message<PROOF_BYTES>),
}

impl Answer {
    /// For a connection that was just accepted.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { hello: [0; HELLO_BYTES], nonce: nonce()?, stage: AnswerStage::Encrypting })
    }

    /// Goes as far as the socket allows; gives the dialer's rank. `is_taken` says whether a rank is connected already.
    pub(super) fn advance(
        &mut self,
        stream: &Pipe,
        identity: &Identity,
        is_taken: impl Fn(Rank) -> bool,
    ) -> Result<Step<Rank>, HandshakeError> {
        loop {
            match &mut self.stage {
                AnswerStage::Encrypting => match stream.shake_hands()? {
                    Some(wants) => return Ok(Step::Blocked(wants)),
                    None => self.stage = AnswerStage::Hello(Message::new([0; HELLO_BYTES])),
                },
                AnswerStage::Hello(message) => {
                    if !message.read(stream)? {
                        return Ok(Step::Blocked(Wants::Read));
                    }
                    self.hello = message.bytes;
                    let refusal = check_hello(&self.hello, identity, &is_taken);
                    if refusal == Some(Refusal::Protocol) {
                        return Err(HandshakeError::Refused(Refusal::Protocol));
                    }
                    let answer = self.answer(refusal, identity, &stream.binding()?);
                    self.stage = AnswerStage::Answer(Message::new(answer), refusal);
                }
                AnswerStage::Answer(message, refusal) => {
                    if !message.write(stream)? {
                        return Ok(Step::Blocked(Wants::Write));
                    }
                    if let Some(refusal) = refusal {
                        return Err(HandshakeError::Refused(*refusal));
                    }
                    self.stage = AnswerStage::Proof(Message::new([0; PROOF_BYTES]));
                }
                AnswerStage::Proof(message) => {
                    if !message.read(stream)? {
                        return Ok(Step::Blocked(Wants::Read));
                    }
                    mac(identity, DIALER, [&self.hello, &self.nonce, &stream.binding()?])
                        .verify_slice(&message.bytes)
                        .map_err(|_| HandshakeError::Refused(Refusal::Secret))?;
                    return Ok(Step::Done(HelloFields::of(&self.hello).from));
                }
            }
        }
    }

    fn answer(&self, refusal: Option<Refusal>, identity: &Identity, binding: &Binding) -> [u8; ANSWER_BYTES] {
        let (code, detail) = code_of(refusal.as_ref(), identity);
        let proof: [u8; PROOF_BYTES] = match refusal {
            Some(_) => [0; PROOF_BYTES],
            None => mac(identity, ACCEPTOR, [&self.hello, &self.nonce, binding]).finalize().into_bytes().into(),
        };
        let answer = [&code.to_le_bytes()[..], &detail.to_le_bytes(), &self.nonce, &proof].concat();
        answer.try_into().expect("the fields above have ANSWER_BYTES together")
    }
}

/// Reads numbers from a message of known length.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk::<N>().expect("the message is as long as its fields");
        self.0 = rest;
        *field
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

struct HelloFields {
    magic: [u8; 8],
    version: u32,
    generation: Generation,
    from: Rank,
    to: Rank,
    world: u32,
}

impl HelloFields {
    fn of(hello: &[u8; HELLO_BYTES]) -> Self {
        let mut fields = Fields(hello);
        Self {
            magic: fields.take(),
            version: fields.u32(),
            generation: Generation(fields.u64()),
            from: Rank(fields.u32()),
            to: Rank(fields.u32()),
            world: fields.u32(),
        }
    }
}

/// Why the acceptor refuses a dialer, if it does, in the acceptor's words.
fn check_hello(hello: &[u8; HELLO_BYTES], identity: &Identity, is_taken: &impl Fn(Rank) -> bool) -> Option<Refusal> {
    let HelloFields { magic, version, generation, from, to, world } = HelloFields::of(hello);
    let Group { rank, world: ours } = identity.group;
    if magic != MAGIC {
        Some(Refusal::Protocol)
    } else if version != PROTOCOL_VERSION {
        Some(Refusal::Version { ours: PROTOCOL_VERSION, theirs: version })
    } else if generation != identity.generation {
        Some(Refusal::Generation { ours: identity.generation, theirs: generation })
    } else if world != ours.get() {
        Some(Refusal::World { ours, theirs: world })
    } else if to != rank || from == rank || !ours.contains(from) {
        Some(Refusal::WrongPeer { expected: to, found: rank })
    } else if is_taken(from) {
        Some(Refusal::Duplicate { rank: from })
    } else {
        None
    }
}

/// A refusal as the acceptor sends it: a code, and the acceptor's own value of what differs.
fn code_of(refusal: Option<&Refusal>, identity: &Identity) -> (u32, u64) {
    match refusal {
        None => (0, 0),
        Some(Refusal::Version { ours, .. }) => (1, u64::from(*ours)),
        Some(Refusal::Generation { ours, .. }) => (2, ours.0),
        Some(Refusal::World { ours, .. }) => (3, u64::from(ours.get())),
        Some(Refusal::WrongPeer { .. }) => (4, u64::from(identity.group.rank.0)),
        Some(Refusal::Duplicate { .. }) => (5, 0),
        Some(Refusal::Secret | Refusal::Protocol) => (6, 0),
    }
}

/// The same refusal in the dialer's words.
fn refusal_of(code: u32, detail: u64, identity: &Identity, to: Rank) -> Option<Refusal> {
    let small = u32::try_from(detail).unwrap_or(u32::MAX);
    match code {
        0 => None,
        1 => Some(Refusal::Version { ours: PROTOCOL_VERSION, theirs: small }),
        2 => Some(Refusal::Generation { ours: identity.generation, theirs: Generation(detail) }),
        3 => Some(Refusal::World { ours: identity.group.world, theirs: small }),
        4 => Some(Refusal::WrongPeer { expected: to, found: Rank(small) }),
        5 => Some(Refusal::Duplicate { rank: identity.group.rank }),
        _ => Some(Refusal::Protocol),
    }
}

/// A secret of the TLS session; zeros without TLS.
type Binding = [u8; BINDING_BYTES];

/// A proof over a side's label, and what the dialer said, the acceptor's nonce and the binding, all of fixed lengths.
fn mac(identity: &Identity, label: &[u8], parts: [&[u8]; 3]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(&identity.secret).expect("HMAC takes keys of any length");
    mac.update(label);
    parts.into_iter().for_each(|part| mac.update(part));
    mac
}

fn nonce() -> io::Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    let mut filled = 0;
    while filled < NONCE_BYTES {
        match rustix::rand::getrandom(&mut nonce[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(nonce)
}
