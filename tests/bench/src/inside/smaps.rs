//! `/proc/PID/smaps` and `/proc/meminfo`.

use std::fs;

use anyhow::{Context, Result, bail};

/// Anonymous memory of that size in one mapping is a guest's RAM: nothing else in a VMM is as big.
/// A VMM's heaps and stacks are smaller.
const GUEST_RAM_BYTES_MIN: u64 = 64 * 1024 * 1024;

/// What a process takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) pss_bytes: u64,
    /// The part of it that is a guest's RAM.
    pub(super) guest_pss_bytes: u64,
    /// Of the guest's RAM, all that is there.
    pub(super) guest_rss_bytes: u64,
}

impl Usage {
    /// From the text of smaps. Kernel threads have none, and no memory.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let mut usage = Self::default();
        let mut is_guest_ram = false;
        for line in text.lines() {
            let Some((first, rest)) = line.split_once(char::is_whitespace) else {
                bail!("a line of another form: {line:?}");
            };
            match first {
                "Pss:" => {
                    let bytes = kib(rest)?;
                    usage.pss_bytes = usage.pss_bytes.saturating_add(bytes);
                    if is_guest_ram {
                        usage.guest_pss_bytes = usage.guest_pss_bytes.saturating_add(bytes);
                    }
                }
                "Rss:" if is_guest_ram => {
                    usage.guest_rss_bytes = usage.guest_rss_bytes.saturating_add(kib(rest)?);
                }
                other if other.ends_with(':') => {}
                range => is_guest_ram = is_guest_ram_mapping(range, rest)?,
            }
        }
        Ok(usage)
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            pss_bytes: self.pss_bytes.saturating_add(other.pss_bytes),
            guest_pss_bytes: self.guest_pss_bytes.saturating_add(other.guest_pss_bytes),
            guest_rss_bytes: self.guest_rss_bytes.saturating_add(other.guest_rss_bytes),
        }
    }
}

/// `START-END` and `PERMISSIONS OFFSET DEVICE INODE [PATH]`.
fn is_guest_ram_mapping(range: &str, rest: &str) -> Result<bool> {
    let parse =
        |text| u64::from_str_radix(text, 16).with_context(|| format!("no address: {text:?}"));
    let Some((start, end)) = range.split_once('-') else {
        bail!("no range of addresses: {range:?}");
    };
    let bytes = parse(end)?.saturating_sub(parse(start)?);
    let mut words = rest.split_whitespace();
    let is_writable = words.next().is_some_and(|word| word.starts_with("rw"));
    let path = words.nth(3).unwrap_or_default();
    let is_nobodys_file = path.is_empty() || path.starts_with("/memfd:");
    Ok(bytes >= GUEST_RAM_BYTES_MIN && is_writable && is_nobodys_file)
}

/// `123 kB`
fn kib(text: &str) -> Result<u64> {
    let number = text.trim().strip_suffix(" kB");
    let number = number.with_context(|| format!("not in kB: {text:?}"))?;
    let kib: u64 = number
        .parse()
        .with_context(|| format!("no number: {text:?}"))?;
    Ok(kib.saturating_mul(1024))
}

/// What the machine could still give away.
pub(super) fn available_bytes() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let mut lines = text.lines();
    let available = lines.find_map(|line| line.strip_prefix("MemAvailable:"));
    kib(available.context("/proc/meminfo has no MemAvailable")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAP: &str =
        "55d0-55f0 rw-p 00000000 00:00 0    [heap]\nSize: 8 kB\nRss: 8 kB\nPss: 4 kB\n";

    fn mapping(size: u64, permissions: &str, path: &str) -> String {
        format!(
            "{:x}-{:x} {permissions} 00000000 00:01 77  {path}\nRss:  40 kB\nPss:  20 kB\n",
            0x7000_0000_0000_u64,
            0x7000_0000_0000_u64 + size
        )
    }

    #[test]
    fn smaps_of_another_form_is_an_error() {
        for bad in ["x", "12 rw-p 0", "g-h rw-p 0", "Pss: 4 MB", "Pss: x kB"] {
            assert!(Usage::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn process_without_memory_has_none() {
        assert_eq!(Usage::parse("").unwrap(), Usage::default());
    }

    #[test]
    fn guest_ram_is_told_from_the_rest() {
        let big = GUEST_RAM_BYTES_MIN;
        for ram in [mapping(big, "rw-p", ""), mapping(big, "rw-s", "/memfd:ram")] {
            let usage = Usage::parse(&format!("{HEAP}{ram}{HEAP}")).unwrap();
            let parts = (
                usage.pss_bytes,
                usage.guest_pss_bytes,
                usage.guest_rss_bytes,
            );
            assert_eq!(parts, (28 * 1024, 20 * 1024, 40 * 1024));
        }
        let others = [
            mapping(big - 4096, "rw-p", ""),
            mapping(big, "---p", ""),
            mapping(big, "rw-p", "/usr/lib/locale"),
        ];
        for other in others {
            assert_eq!(Usage::parse(&other).unwrap().guest_pss_bytes, 0, "{other}");
        }
    }
}
