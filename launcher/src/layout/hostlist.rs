//! Slurm's compact lists of hosts: `node[01-03,07],gpu-a`.
//!
//! Owns: the grammar. Refuses to know: what the hosts are for. Several brackets in one name multiply (`r[1-2]n[1-2]`).

/// No job spans more hosts; a hostile range must not fill the memory.
const HOSTS_LIMIT: usize = 1 << 17;

/// Expands a list. `None` when it is malformed or names too many hosts.
pub(crate) fn expand(list: &str) -> Option<Vec<String>> {
    let mut hosts = Vec::new();
    for pattern in split_outside_brackets(list)? {
        let mut names = vec![String::new()];
        let mut rest = pattern;
        while let Some((literal, bracket)) = rest.split_once('[') {
            let (ranges, tail) = bracket.split_once(']')?;
            let numbers = expand_ranges(ranges)?;
            if names.len().checked_mul(numbers.len())? > HOSTS_LIMIT {
                return None;
            }
            names = names.iter().flat_map(|name| numbers.iter().map(move |n| format!("{name}{literal}{n}"))).collect();
            rest = tail;
        }
        hosts.extend(names.into_iter().map(|name| name + rest));
        if hosts.len() > HOSTS_LIMIT {
            return None;
        }
    }
    Some(hosts)
}

fn split_outside_brackets(list: &str) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0_usize, 0_i32);
    for (position, character) in list.char_indices() {
        match character {
            '[' => depth += 1,
            ']' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(list.get(start..position)?);
                start = position + 1;
            }
            _ => {}
        }
        if !(0..=1).contains(&depth) {
            return None;
        }
    }
    parts.push(list.get(start..)?);
    (depth == 0 && parts.iter().all(|part| !part.is_empty())).then_some(parts)
}

/// `01-03,07` becomes 01, 02, 03, 07: the width of the first number is kept.
fn expand_ranges(ranges: &str) -> Option<Vec<String>> {
    let mut numbers = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (width, first, last) = (first.len(), first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        let count = usize::try_from(last.checked_sub(first)?).ok()?.checked_add(1)?;
        if numbers.len().checked_add(count)? > HOSTS_LIMIT {
            return None;
        }
        numbers.extend((first..=last).map(|number| format!("{number:0width$}")));
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(list: &str, expected: &[&str]) {
        assert_eq!(expand(list).expect(list), expected);
    }

    #[test]
    fn lists_expand_as_scontrol_show_hostnames_does() {
        check("gpu-a", &["gpu-a"]);
        check("node[01-03,07],gpu-a", &["node01", "node02", "node03", "node07", "gpu-a"]);
        check("n[9-11].cluster", &["n9.cluster", "n10.cluster", "n11.cluster"]);
        check("r[1-2]n[0-1]", &["r1n0", "r1n1", "r2n0", "r2n1"]);
        check("a,b,c", &["a", "b", "c"]);
    }

    #[test]
    fn malformed_and_endless_lists_are_refused() {
        for list in ["", "a,", "n[1", "n1]", "n[3-1]", "n[x]", "n[]", "n[[1]]", "n[0-4294967295]", "n[1-999]m[1-999]"] {
            assert_eq!(expand(list), None, "{list}");
        }
    }
}
