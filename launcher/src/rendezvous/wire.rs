//! Frames between launchers: a length, an authentication code, JSON.
//!
//! Owns: the handshake, the code of each frame, and the limits. Refuses to know: what the messages mean.
//!
//! - RV-1: the token never travels. Both sides send 32 random bytes in the clear; the key is HMAC-SHA256 of them under the
//!   token, and each frame carries the HMAC of (direction, number, body) under the key: a frame that was changed, repeated,
//!   left out or reflected is an error. Bodies are not secret; they hold nothing that is.
//! - RV-2: the first frame is small and must come soon, so that a stranger cannot hold memory or a connection.

use hmac::{Hmac, KeyInit as _, Mac};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::Sha256;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::messages::PROTOCOL;

/// The longest body, in bytes: a report with the last lines of a rank's output, cut by the sender.
const BODY_LIMIT: usize = 256 * 1024;
const NONCE_BYTES: usize = 32;
const CODE_BYTES: usize = 32;

/// Why a frame could not be sent or received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum WireError {
    /// The connection failed or ended.
    #[error("the connection failed")]
    Connection(#[from] std::io::Error),
    /// The code does not fit: another token, another version, or somebody in between.
    #[error("the other side has another token, or another version")]
    Forged,
    /// A length above the limit.
    #[error("a frame of {found} bytes, expected at most {limit}")]
    TooLong {
        /// The limit.
        limit: usize,
        /// The length.
        found: usize,
    },
    /// The body is no message.
    #[error("a frame that is no message")]
    Malformed(#[from] serde_json::Error),
}

/// Which side sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The launcher that connected.
    Launcher,
    /// The rendezvous.
    Meeting,
}

/// One direction of a connection.
#[derive(Debug)]
pub(crate) struct Channel<S> {
    stream: S,
    key: [u8; CODE_BYTES],
    sender: Side,
    number: u64,
}

/// Exchanges random numbers and makes the two directions: what `here` sends, and what it receives.
pub(crate) async fn shake_hands<R, W>(
    mut reader: R,
    mut writer: W,
    here: Side,
    token: &[u8],
) -> Result<(Channel<R>, Channel<W>), WireError>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let (mut mine, mut theirs) = ([0_u8; NONCE_BYTES], [0_u8; NONCE_BYTES]);
    rustix::rand::getrandom(&mut mine, rustix::rand::GetRandomFlags::empty()).map_err(std::io::Error::from)?;
    writer.write_all(&mine).await?;
    reader.read_exact(&mut theirs).await?;
    let (launcher, meeting) = if here == Side::Launcher { (mine, theirs) } else { (theirs, mine) };
    let key = code(token, &[PROTOCOL.as_bytes(), &launcher, &meeting]);
    let there = if here == Side::Launcher { Side::Meeting } else { Side::Launcher };
    Ok((
        Channel { stream: reader, key, sender: there, number: 0 },
        Channel { stream: writer, key, sender: here, number: 0 },
    ))
}

impl<W: AsyncWrite + Unpin> Channel<W> {
    /// Sends a message. Not cancel safe.
    pub(crate) async fn send(&mut self, message: &impl Serialize) -> Result<(), WireError> {
        let body = serde_json::to_vec(message)?;
        if body.len() > BODY_LIMIT {
            return Err(WireError::TooLong { limit: BODY_LIMIT, found: body.len() });
        }
        let length =
            u32::try_from(body.len()).map_err(|_| WireError::TooLong { limit: BODY_LIMIT, found: body.len() })?;
        let mut frame = Vec::with_capacity(body.len() + CODE_BYTES + 4);
        frame.extend_from_slice(&length.to_be_bytes());
        frame.extend_from_slice(&self.next_code(&body));
        frame.extend_from_slice(&body);
        self.stream.write_all(&frame).await?;
        Ok(())
    }

    /// Says that nothing more will be sent.
    pub(crate) async fn finish(&mut self) -> Result<(), WireError> {
        Ok(self.stream.shutdown().await?)
    }
}

impl<R: AsyncRead + Unpin> Channel<R> {
    /// Receives a message. Not cancel safe.
    pub(crate) async fn receive<M: DeserializeOwned>(&mut self) -> Result<M, WireError> {
        let found = usize::try_from(self.stream.read_u32().await?).unwrap_or(usize::MAX);
        if found > BODY_LIMIT {
            return Err(WireError::TooLong { limit: BODY_LIMIT, found });
        }
        let mut claimed = [0_u8; CODE_BYTES];
        self.stream.read_exact(&mut claimed).await?;
        let mut body = vec![0_u8; found];
        self.stream.read_exact(&mut body).await?;
        let expected = self.next_code(&body);
        // No early exit at the first difference, so that the time tells nothing about the code.
        if expected.iter().zip(claimed).fold(0, |difference, (a, b)| difference | (a ^ b)) != 0 {
            return Err(WireError::Forged);
        }
        Ok(serde_json::from_slice(&body)?)
    }
}

impl<S> Channel<S> {
    fn next_code(&mut self, body: &[u8]) -> [u8; CODE_BYTES] {
        let side: &[u8] = if self.sender == Side::Launcher { b"L" } else { b"M" };
        let code = code(&self.key, &[side, &self.number.to_be_bytes(), body]);
        self.number += 1;
        code
    }
}

fn code(key: &[u8], parts: &[&[u8]]) -> [u8; CODE_BYTES] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair(
        token_a: &[u8],
        token_b: &[u8],
    ) -> (Channel<impl AsyncRead + Unpin>, Channel<impl AsyncWrite + Unpin>) {
        let (a, b) = tokio::io::duplex(4096);
        let ((_, a_writer), (b_reader, _)) = {
            let ((ar, aw), (br, bw)) = (tokio::io::split(a), tokio::io::split(b));
            let (left, right) =
                tokio::join!(shake_hands(ar, aw, Side::Launcher, token_a), shake_hands(br, bw, Side::Meeting, token_b));
            (left.expect("a duplex works"), right.expect("a duplex works"))
        };
        (b_reader, a_writer)
    }

    #[tokio::test]
    async fn messages_arrive_with_the_same_token_only() {
        let (mut reader, mut writer) = pair(b"secret", b"secret").await;
        for text in ["one", "two"] {
            writer.send(&text).await.expect("a duplex works");
            assert_eq!(reader.receive::<String>().await.expect("it is genuine"), text);
        }
        let (mut reader, mut writer) = pair(b"secret", b"other").await;
        writer.send(&"one").await.expect("a duplex works");
        assert!(matches!(reader.receive::<String>().await, Err(WireError::Forged)));
    }

    #[tokio::test]
    async fn a_frame_cannot_be_repeated_or_be_endless() {
        let key = [7; CODE_BYTES];
        let mut sent = Channel { stream: Vec::new(), key, sender: Side::Launcher, number: 0 };
        sent.send(&"x").await.expect("a vector takes all");
        let twice = sent.stream.repeat(2);
        let mut reader = Channel { stream: twice.as_slice(), key, sender: Side::Launcher, number: 0 };
        assert_eq!(reader.receive::<String>().await.expect("the first is genuine"), "x");
        assert!(matches!(reader.receive::<String>().await, Err(WireError::Forged)));
        let mut endless = Channel { stream: [0xff; 64].as_slice(), key, sender: Side::Launcher, number: 0 };
        assert!(matches!(endless.receive::<String>().await, Err(WireError::TooLong { .. })));
    }

    #[test]
    fn the_code_is_hmac_sha256() {
        // RFC 4231, test case 2.
        let found = code(b"Jefe", &[b"what do ya want ", b"for nothing?"]);
        let hex: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }
}
