//! The zip archive that `torch.save` writes: stored entries, never compressed, found through the central directory.
//!
//! Owns: where each entry's bytes are. Refuses to know: what is in them. Every offset is checked against the file.

use std::collections::BTreeMap;

use super::model_directory_error::CkptError;
use crate::store::ReadAt;
use crate::types::{ByteRange, as_u64, as_usize};

/// The end record, and the longest comment behind it.
const END_BYTES: u64 = 22;
const MAX_COMMENT_BYTES: u64 = 65_535;
/// The fixed part of an entry of the central directory, and of the header before an entry's bytes.
const CENTRAL_BYTES: usize = 46;
const LOCAL_BYTES: u64 = 30;
/// A checkpoint has an entry per tensor; a longer directory is none.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;

/// The entries of an archive: the bytes of each, by name.
pub(super) fn entries(path: &str, file: &dyn ReadAt) -> Result<BTreeMap<String, ByteRange>, CkptError> {
    let damaged = |what: &'static str| CkptError::Archive { path: path.to_owned(), what };
    let (start, len) = directory(path, file)?;
    if len > MAX_DIRECTORY_BYTES {
        return Err(damaged("its directory is longer than 64 MiB"));
    }
    let mut bytes = vec![0; as_usize(len)];
    read(path, file, start, &mut bytes)?;
    let mut rest = bytes.as_slice();
    let mut entries = BTreeMap::new();
    while !rest.is_empty() {
        let entry = rest.get(..CENTRAL_BYTES).filter(|entry| entry.starts_with(b"PK\x01\x02"));
        let entry = entry.ok_or_else(|| damaged("its directory has an entry that is none"))?;
        let size = |at: usize| usize::from(u16_at(entry, at));
        let (name_len, extra_len, comment_len) = (size(28), size(30), size(32));
        let tail = rest.get(CENTRAL_BYTES..).unwrap_or_default();
        let name = tail.get(..name_len).ok_or_else(|| damaged("a name is cut"))?;
        let extra = tail.get(name_len..name_len + extra_len).ok_or_else(|| damaged("a name is cut"))?;
        let name = String::from_utf8(name.to_vec()).map_err(|_| damaged("a name is not UTF-8"))?;
        if u16_at(entry, 8) & 1 != 0 || u16_at(entry, 10) != 0 {
            return Err(damaged("an entry is compressed or encrypted, which torch.save does not do"));
        }
        let (bytes, local) = sizes(entry, extra).ok_or_else(|| damaged("an entry has no 64-bit size"))?;
        let mut header = [0; as_usize(LOCAL_BYTES)];
        read(path, file, local, &mut header)?;
        let skip = LOCAL_BYTES + u64::from(u16_at(&header, 26)) + u64::from(u16_at(&header, 28));
        let range = local.checked_add(skip).and_then(|start| ByteRange::with_len(start, bytes));
        let range = range.filter(|range| header.starts_with(b"PK\x03\x04") && range.end() <= file.len_bytes());
        entries.insert(name, range.ok_or_else(|| damaged("an entry lies outside the file"))?);
        rest = tail.get(name_len + extra_len + comment_len..).unwrap_or_default();
    }
    Ok(entries)
}

/// Start and length of the central directory.
fn directory(path: &str, file: &dyn ReadAt) -> Result<(u64, u64), CkptError> {
    let damaged = |what: &'static str| CkptError::Archive { path: path.to_owned(), what };
    let tail_len = file.len_bytes().min(END_BYTES + MAX_COMMENT_BYTES);
    let mut tail = vec![0; as_usize(tail_len)];
    read(path, file, file.len_bytes() - tail_len, &mut tail)?;
    let found = tail.windows(as_usize(END_BYTES)).rposition(|window| window.starts_with(b"PK\x05\x06"));
    let at = found.ok_or_else(|| damaged("it is no zip archive, as torch.save writes since version 1.6"))?;
    let end = tail.get(at..).unwrap_or_default();
    let (len, start) = (u32_at(end, 12), u32_at(end, 16));
    if start != u32::MAX && len != u32::MAX && u16_at(end, 10) != u16::MAX {
        return Ok((u64::from(start), u64::from(len)));
    }
    // The 64-bit end record, through the locator of 20 bytes before the end record.
    let no_record = || damaged("its 64-bit end record is missing");
    let locator = at.checked_sub(20).and_then(|at| tail.get(at..)).filter(|rest| rest.starts_with(b"PK\x06\x07"));
    let record_at = u64_at(locator.ok_or_else(no_record)?, 8);
    let mut record = [0; 56];
    read(path, file, record_at, &mut record)?;
    if !record.starts_with(b"PK\x06\x06") {
        return Err(no_record());
    }
    Ok((u64_at(&record, 48), u64_at(&record, 40)))
}

/// An entry's length and the place of its local header, 64 bits wide where 32 do not suffice.
fn sizes(entry: &[u8], mut extra: &[u8]) -> Option<(u64, u64)> {
    let (packed, whole, local) = (u32_at(entry, 20), u32_at(entry, 24), u32_at(entry, 42));
    let mut wide = &[][..];
    while let Some((head, rest)) = extra.split_first_chunk::<4>() {
        let len = usize::from(u16_at(head, 2));
        let field = rest.get(..len)?;
        if u16_at(head, 0) == 1 {
            wide = field;
        }
        extra = rest.get(len..)?;
    }
    let mut widen = |narrow: u32| {
        if narrow != u32::MAX {
            return Some(u64::from(narrow));
        }
        let (value, rest) = wide.split_first_chunk::<8>()?;
        wide = rest;
        Some(u64::from_le_bytes(*value))
    };
    let whole = widen(whole)?;
    let packed = widen(packed)?;
    let local = widen(local)?;
    (packed == whole).then_some((whole, local))
}

fn read(path: &str, file: &dyn ReadAt, offset: u64, into: &mut [u8]) -> Result<(), CkptError> {
    let end = offset.checked_add(as_u64(into.len()));
    if end.is_none_or(|end| end > file.len_bytes()) {
        return Err(CkptError::Archive { path: path.to_owned(), what: "a part of it lies outside the file" });
    }
    Ok(file.read_exact_at(offset, into)?)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}
