//! Addresses of many peers as bytes: what every rank is told of every other is the largest message of a large world.
//!
//! Owns: the form. An IPv4 address takes 7 bytes: 4, the address, and the port, big-endian; an IPv6 address 19: 16, the address,
//! and the port. Refuses to know: whose addresses they are.

use std::net::{IpAddr, SocketAddr};

/// The bytes are no addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("addresses of peers: expected 4 or 16, an address and a port at byte {at}, found something else")]
pub struct BadAddresses {
    /// Where it was found.
    pub at: usize,
}

/// The addresses, one after the other. One that is none, such as a name, is kept apart by a length of 0, which no reader takes.
#[must_use]
pub fn pack_addresses<'a>(addresses: impl Iterator<Item = &'a str>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for address in addresses {
        let Ok(address) = address.parse::<SocketAddr>() else {
            bytes.push(0);
            continue;
        };
        match address.ip() {
            IpAddr::V4(ip) => {
                bytes.push(4);
                bytes.extend(ip.octets());
            }
            IpAddr::V6(ip) => {
                bytes.push(16);
                bytes.extend(ip.octets());
            }
        }
        bytes.extend(address.port().to_be_bytes());
    }
    bytes
}

/// The other way round.
///
/// # Errors
/// [`BadAddresses`].
pub fn unpack_addresses(bytes: &[u8]) -> Result<Vec<SocketAddr>, BadAddresses> {
    let (mut addresses, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let found = take_address(rest);
        let (address, after) = found.ok_or_else(|| BadAddresses { at: bytes.len() - rest.len() })?;
        addresses.push(address);
        rest = after;
    }
    Ok(addresses)
}

fn take_address(bytes: &[u8]) -> Option<(SocketAddr, &[u8])> {
    let (ip, rest) = match bytes.split_first()? {
        (4, rest) => {
            let (octets, rest) = rest.split_first_chunk::<4>()?;
            (IpAddr::from(*octets), rest)
        }
        (16, rest) => {
            let (octets, rest) = rest.split_first_chunk::<16>()?;
            (IpAddr::from(*octets), rest)
        }
        _ => return None,
    };
    let (port, rest) = rest.split_first_chunk::<2>()?;
    Some((SocketAddr::new(ip, u16::from_be_bytes(*port)), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_the_form_that_is_written_down() {
        let words = ["10.0.0.1:4000", "[::1]:80"];
        let bytes = pack_addresses(words.into_iter());
        let mut expected = vec![4, 10, 0, 0, 1, 0x0f, 0xa0, 16];
        expected.extend([0; 15]);
        expected.extend([1, 0, 80]);
        assert_eq!(bytes, expected);
        let addresses = unpack_addresses(&bytes).expect("as written");
        assert_eq!(addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), words);
    }

    #[test]
    fn what_is_no_address_is_named_by_its_place() {
        assert_eq!(unpack_addresses(&[]), Ok(Vec::new()));
        let cut = pack_addresses(["10.0.0.1:4000", "10.0.0.2:4000"].into_iter());
        for length in 8..14 {
            assert_eq!(unpack_addresses(&cut[..length]), Err(BadAddresses { at: 7 }), "{length}");
        }
        assert_eq!(unpack_addresses(&pack_addresses(["name:4000"].into_iter())), Err(BadAddresses { at: 0 }));
    }
}
