//! What the client and the backend of a benchmark say to each other.
//!
//! Owns: the command that opens each connection, and the bytes that both sides expect. Must never: touch a socket.
//! Every byte is predictable from its position, so that both ends notice a byte that is lost, doubled or moved.

use anyhow::{Context, Result, bail, ensure};

/// Length of the command that opens each connection, in bytes.
pub const COMMAND_LEN: usize = 16;
/// Length of a [`Stamp`] and of a [`Receipt`], in bytes.
pub const ANSWER_LEN: usize = 16;
/// Most bytes that one read or write moves, so that [`Pattern::at`] always has them in one piece.
pub const CHUNK_LEN: usize = 128 * 1024;

const MAGIC: [u8; 7] = *b"drowse\x01";
/// A prime, so that no buffer or page size divides it and a shift by one of those shows.
const PERIOD: usize = 65_521;

/// What the client asks of the backend, once, in the first [`COMMAND_LEN`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Send back whatever comes.
    Echo,
    /// Answer with a [`Stamp`].
    Stamp,
    /// Read so many bytes of the pattern, then answer with a [`Receipt`].
    Upload(u64),
    /// Send so many bytes of the pattern.
    Download(u64),
    /// Both at once, the receipt last.
    Both(u64),
}

impl Command {
    /// The command as it travels.
    #[must_use]
    pub fn encode(self) -> [u8; COMMAND_LEN] {
        let (code, bytes) = match self {
            Self::Echo => (b'E', 0),
            Self::Stamp => (b'S', 0),
            Self::Upload(bytes) => (b'U', bytes),
            Self::Download(bytes) => (b'D', bytes),
            Self::Both(bytes) => (b'B', bytes),
        };
        let mut head = [code; 8];
        if let Some(rest) = head.get_mut(1..) {
            rest.copy_from_slice(&MAGIC);
        }
        pair(u64::from_le_bytes(head), bytes)
    }

    /// Reads a command.
    ///
    /// # Errors
    /// When the bytes are no command: the client speaks something else, or the proxy changed them.
    pub fn decode(bytes: [u8; COMMAND_LEN]) -> Result<Self> {
        let (head, count) = unpair(bytes);
        let [code, magic @ ..] = head.to_le_bytes();
        ensure!(magic == MAGIC, "the connection does not begin with a command");
        Ok(match code {
            b'E' => Self::Echo,
            b'S' => Self::Stamp,
            b'U' => Self::Upload(count),
            b'D' => Self::Download(count),
            b'B' => Self::Both(count),
            _ => bail!("unknown command {code:#x}"),
        })
    }
}

/// When the backend began to listen, and which process it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// `CLOCK_MONOTONIC` right after `listen(2)`, in nanoseconds.
    pub listened_at_ns: u64,
    /// The backend's process.
    pub pid: u64,
}

impl Stamp {
    /// The stamp as it travels.
    #[must_use]
    pub fn encode(self) -> [u8; ANSWER_LEN] {
        pair(self.listened_at_ns, self.pid)
    }

    /// Reads a stamp.
    #[must_use]
    pub fn decode(bytes: [u8; ANSWER_LEN]) -> Self {
        let (listened_at_ns, pid) = unpair(bytes);
        Self { listened_at_ns, pid }
    }
}

/// The backend's word on an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// Bytes that arrived as expected before the end or the first wrong chunk.
    pub bytes: u64,
    /// Whether all of them were right.
    pub right: bool,
}

impl Receipt {
    /// The receipt as it travels.
    #[must_use]
    pub fn encode(self) -> [u8; ANSWER_LEN] {
        pair(self.bytes, u64::from(self.right))
    }

    /// Checks a receipt for an upload of `bytes`.
    ///
    /// # Errors
    /// When the backend got something other than what was sent.
    pub fn check(answer: [u8; ANSWER_LEN], bytes: u64) -> Result<()> {
        let (arrived, right) = unpair(answer);
        ensure!(right == 1, "the backend got wrong bytes after {arrived} right ones");
        ensure!(arrived == bytes, "the backend got {arrived} of {bytes} bytes");
        Ok(())
    }
}

/// The bytes that every stream of a benchmark consists of.
#[derive(Debug)]
pub struct Pattern {
    bytes: Vec<u8>,
}

impl Default for Pattern {
    fn default() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let period: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[7]
        })
        .take(PERIOD)
        .collect();
        Self { bytes: period.iter().copied().cycle().take(PERIOD + CHUNK_LEN).collect() }
    }
}

impl Pattern {
    /// The `len` bytes (at most [`CHUNK_LEN`]) that belong at `position` of a stream.
    ///
    /// # Errors
    /// When `len` is greater than [`CHUNK_LEN`].
    pub fn at(&self, position: u64, len: usize) -> Result<&[u8]> {
        let start = usize::try_from(position % PERIOD as u64).context("place a position in the pattern")?;
        self.bytes.get(start..start + len).context("a piece of the pattern is longer than a chunk")
    }
}

fn pair(first: u64, second: u64) -> [u8; 16] {
    (u128::from(first) | u128::from(second) << 64).to_le_bytes()
}

fn unpair(bytes: [u8; 16]) -> (u64, u64) {
    let both = u128::from_le_bytes(bytes);
    let low = u64::try_from(both & u128::from(u64::MAX)).unwrap_or(u64::MAX);
    let high = u64::try_from(both >> 64).unwrap_or(u64::MAX);
    (low, high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_stamps_survive_the_wire() {
        for command in
            [Command::Echo, Command::Stamp, Command::Upload(7), Command::Download(u64::MAX), Command::Both(0)]
        {
            assert_eq!(Command::decode(command.encode()).unwrap(), command);
        }
        let stamp = Stamp { listened_at_ns: u64::MAX - 3, pid: 17 };
        assert_eq!(Stamp::decode(stamp.encode()), stamp);
    }

    #[test]
    fn bytes_of_another_protocol_are_no_command() {
        assert!(Command::decode(*b"GET / HTTP/1.1\r\n").is_err());
        let mut unknown = Command::Echo.encode();
        unknown[0] = b'?';
        assert!(Command::decode(unknown).is_err());
    }

    #[test]
    fn a_receipt_names_wrong_and_missing_bytes() {
        assert!(Receipt::check(Receipt { bytes: 9, right: true }.encode(), 9).is_ok());
        assert!(Receipt::check(Receipt { bytes: 8, right: true }.encode(), 9).is_err());
        assert!(Receipt::check(Receipt { bytes: 9, right: false }.encode(), 9).is_err());
    }

    #[test]
    fn the_pattern_shows_shifts_by_any_usual_buffer_size() {
        let pattern = Pattern::default();
        for shift in [1, 16, 512, 1448, 4096, 65_536, 131_072] {
            assert_ne!(pattern.at(0, 64).unwrap(), pattern.at(shift, 64).unwrap(), "shift by {shift}");
        }
        assert_eq!(pattern.at(3, CHUNK_LEN).unwrap(), pattern.at(3 + 65_521, CHUNK_LEN).unwrap());
        assert!(pattern.at(0, CHUNK_LEN + 65_522).is_err());
    }
}
