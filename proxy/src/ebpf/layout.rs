//! Where the kernel keeps what the programs read of its own structures: this kernel's offsets, by its own account.
//!
//! Owns: reading BTF (`/sys/kernel/btf/vmlinux`, Linux 5.4 with `CONFIG_DEBUG_INFO_BTF`), as far as the members of structures
//! go. Must never: guess. aya's reader tells no offsets, and btf-rs may not be linked into a program with our licences.
//! Rests on: the format in `Documentation/bpf/btf.rst` of the kernel, little or big endian as the machine is.

use std::fs;

use anyhow::{Context as _, bail};

/// The kernel's types.
pub(super) const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `write_seq` in `struct tcp_sock`.
    pub write_seq: u32,
    /// `sk_wmem_queued` in `struct sock`, with which `struct tcp_sock` begins.
    pub wmem_queued: u32,
    /// `sk_sndbuf` there.
    pub sndbuf: u32,
    /// `copied_seq` in `struct tcp_sock`.
    pub copied_seq: u32,
    /// `mss_cache` in `struct tcp_sock`.
    pub mss: u32,
    /// `notsent_lowat` in `struct tcp_sock`.
    pub notsent_lowat: u32,
    /// `icsk_ulp_ops` in `struct inet_connection_sock`, with which `struct tcp_sock` begins.
    pub ulp_ops: u32,
    /// `sk_socket` in `struct sock`.
    pub socket: u32,
}

/// Asks the kernel. Takes some milliseconds.
///
/// # Errors
/// It has no BTF, or its structures are others than those we know.
pub fn layout() -> anyhow::Result<Layout> {
    let bytes = fs::read(KERNEL_BTF)
        .with_context(|| format!("read {KERNEL_BTF} (the kernel needs CONFIG_DEBUG_INFO_BTF)"))?;
    let btf = Btf::of(&bytes).with_context(|| format!("{KERNEL_BTF} is not as it should be"))?;
    Ok(Layout {
        write_seq: btf.offset("tcp_sock", "write_seq")?,
        wmem_queued: btf.offset("sock", "sk_wmem_queued")?,
        sndbuf: btf.offset("sock", "sk_sndbuf")?,
        copied_seq: btf.offset("tcp_sock", "copied_seq")?,
        mss: btf.offset("tcp_sock", "mss_cache")?,
        notsent_lowat: btf.offset("tcp_sock", "notsent_lowat")?,
        ulp_ops: btf.offset("inet_connection_sock", "icsk_ulp_ops")?,
        socket: btf.offset("sock", "sk_socket")?,
    })
}

/// The sections of a BTF file.
struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

/// A type, as far as it is of interest.
struct Type<'a> {
    name: usize,
    is_struct: bool,
    /// Offsets of members are in the low 24 bits, beside the widths of bit fields.
    has_widths: bool,
    /// What follows the fixed part.
    rest: &'a [u8],
}

impl<'a> Btf<'a> {
    fn of(bytes: &'a [u8]) -> Option<Self> {
        const MAGIC: [u8; 2] = 0xeb9f_u16.to_ne_bytes();
        if !bytes.starts_with(&MAGIC) {
            return None;
        }
        let header = word(bytes, 4)?;
        let section = |at: usize| {
            let start = header.checked_add(word(bytes, at)?)?;
            bytes.get(start..start.checked_add(word(bytes, at + 4)?)?)
        };
        Some(Self { types: section(8)?, strings: section(16)? })
    }

    /// Where `field` lies in `struct structure`, in bytes.
    fn offset(&self, structure: &str, field: &str) -> anyhow::Result<u32> {
        let mut types = self.types;
        while !types.is_empty() {
            let (found, after) =
                Type::first(types).context("the kernel's BTF has types of an unknown kind")?;
            types = after;
            if found.is_struct && self.is(found.name, structure) {
                let fields = found.rest.chunks_exact(MEMBER_BYTES);
                let mut named = fields.filter(|one| word(one, 0).is_some_and(|name| self.is(name, field)));
                let bits = named.next().and_then(|one| word(one, 8));
                if let Some(bits) = bits {
                    let bits = if found.has_widths { bits & 0x00ff_ffff } else { bits };
                    return Ok(u32::try_from(bits / 8)?);
                }
            }
        }
        bail!("the kernel has no struct {structure} with a {field}")
    }

    /// Whether the string at `offset` is `text`.
    fn is(&self, offset: usize, text: &str) -> bool {
        let string = self.strings.get(offset..).and_then(|rest| rest.strip_prefix(text.as_bytes()));
        string.is_some_and(|rest| rest.first() == Some(&0))
    }
}

/// Bytes of `struct btf_member`.
const MEMBER_BYTES: usize = 12;

impl<'a> Type<'a> {
    /// Takes the first type off `types`.
    fn first(types: &'a [u8]) -> Option<(Self, &'a [u8])> {
        const FIXED_BYTES: usize = 12;
        const STRUCT: usize = 4;
        let info = word(types, 4)?;
        let (count, kind) = (info & 0xffff, info >> 24 & 0x1f);
        // The kinds by number: `BTF_KIND_*` in `include/uapi/linux/btf.h`.
        let rest = match kind {
            1 | 14 | 17 => 4,
            3 => 12,
            STRUCT | 5 | 15 | 19 => count * MEMBER_BYTES,
            6 | 13 => count * 8,
            2 | 7..=12 | 16 | 18 => 0,
            _ => return None,
        };
        let (whole, after) = types.split_at_checked(FIXED_BYTES + rest)?;
        let rest = whole.get(FIXED_BYTES..)?;
        Some((
            Self { name: word(whole, 0)?, is_struct: kind == STRUCT, has_widths: info >> 31 == 1, rest },
            after,
        ))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let word = bytes.get(at..)?.first_chunk()?;
    usize::try_from(u32::from_ne_bytes(*word)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_where_its_fields_are() {
        let layout = layout().unwrap();
        assert!(layout.write_seq > 0 && layout.write_seq.is_multiple_of(4), "{layout:?}");
        assert!(layout.write_seq > layout.sndbuf, "a socket begins with what all sockets have: {layout:?}");
        let bytes = fs::read(KERNEL_BTF).unwrap();
        let btf = Btf::of(&bytes).unwrap();
        let error = btf.offset("tcp_sock", "no_such_field").unwrap_err();
        assert!(error.to_string().contains("no_such_field"));
    }

    #[test]
    fn what_is_no_btf_is_refused() {
        assert!(Btf::of(b"").is_none());
        assert!(Btf::of(&[0; 64]).is_none());
        let bytes = fs::read(KERNEL_BTF).unwrap();
        assert!(Btf::of(&bytes[..20]).is_none(), "cut off in the header");
        assert!(Btf::of(&bytes[..1 << 20]).is_none(), "cut off in a section");
        let unknown = Btf { types: &[0xff; 12], strings: &[] };
        assert!(unknown.offset("sock", "sk_sndbuf").unwrap_err().to_string().contains("unknown kind"));
    }
}
