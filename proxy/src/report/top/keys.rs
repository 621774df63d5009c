//! Keys: the bytes of a terminal in raw mode, read as what somebody pressed.
//!
//! PURE. Owns: the few sequences that are understood; others are dropped whole. Must never: wait. Whether a lone ESC is the
//! key or the begin of a sequence only time can tell, see [`Keys::is_pending`].

/// The longest sequence that is waited for; what is longer is none.
const SEQUENCE_BYTES_MAX: usize = 16;
const ESCAPE: u8 = 0x1b;

/// What somebody pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A printable character.
    Char(char),
    /// Return.
    Enter,
    /// Backspace.
    Erase,
    /// Escape.
    Escape,
    /// Ctrl-C, or the end of input.
    Interrupt,
    /// One up.
    Up,
    /// One down.
    Down,
    /// A page up.
    PageUp,
    /// A page down.
    PageDown,
    /// To the first.
    Home,
    /// To the last.
    End,
}

/// Bytes in, keys out.
#[derive(Debug, Default)]
pub struct Keys {
    /// The begin of something whose end has not come yet.
    pending: Vec<u8>,
}

impl Keys {
    /// What `bytes` mean after those that came before.
    pub fn read(&mut self, bytes: &[u8]) -> Vec<Key> {
        self.pending.extend_from_slice(bytes);
        let mut keys = Vec::new();
        let mut rest = self.pending.as_slice();
        while let Some((key, length)) = first(rest) {
            keys.extend(key);
            rest = rest.get(length..).unwrap_or_default();
        }
        self.pending = rest.to_vec();
        keys
    }

    /// Whether more bytes may belong to those that came last. If none come soon, [`Keys::flush`].
    #[must_use]
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Nothing more came: an ESC was the key.
    pub fn flush(&mut self) -> Option<Key> {
        let was_escape = self.pending == [ESCAPE];
        self.pending.clear();
        was_escape.then_some(Key::Escape)
    }
}

/// The first key of `bytes`, if they mean one, and how many bytes it has. `None`: it is not complete.
fn first(bytes: &[u8]) -> Option<(Option<Key>, usize)> {
    match bytes {
        [] | [ESCAPE] => None,
        [ESCAPE, b'[' | b'O', ..] => sequence(bytes),
        // Alt and a key: not used.
        [ESCAPE, ESCAPE, ..] => Some((Some(Key::Escape), 1)),
        [ESCAPE, ..] => Some((None, 2)),
        [b'\r' | b'\n', ..] => Some((Some(Key::Enter), 1)),
        [0x03 | 0x04, ..] => Some((Some(Key::Interrupt), 1)),
        [0x08 | 0x7f, ..] => Some((Some(Key::Erase), 1)),
        [control, ..] if control.is_ascii_control() => Some((None, 1)),
        _ => character(bytes),
    }
}

/// `ESC [ parameters final` or `ESC O final` (ECMA-48 5.4, and the application mode of VT100 cursor keys).
fn sequence(bytes: &[u8]) -> Option<(Option<Key>, usize)> {
    let parameters = bytes.get(2..)?;
    let Some(length) = parameters.iter().position(|byte| (0x40..=0x7e).contains(byte)) else {
        return (bytes.len() >= SEQUENCE_BYTES_MAX).then_some((None, bytes.len()));
    };
    let key = match parameters.get(..=length)? {
        b"A" => Some(Key::Up),
        b"B" => Some(Key::Down),
        b"H" | b"1~" | b"7~" => Some(Key::Home),
        b"F" | b"4~" | b"8~" => Some(Key::End),
        b"5~" => Some(Key::PageUp),
        b"6~" => Some(Key::PageDown),
        _ => None,
    };
    Some((key, 2 + length + 1))
}

/// One character of UTF-8; bytes that are none are dropped.
fn character(bytes: &[u8]) -> Option<(Option<Key>, usize)> {
    let lead = *bytes.first()?;
    let length = match lead {
        0xc0..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf7 => 4,
        _ => 1,
    };
    let whole = bytes.get(..length)?;
    let found = std::str::from_utf8(whole).ok().and_then(|text| text.chars().next());
    Some(found.map_or((None, 1), |found| (Some(Key::Char(found)), length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_sends_is_read() {
        let mut keys = Keys::default();
        let expected = [
            Key::Char('q'),
            Key::Up,
            Key::Down,
            Key::Up,
            Key::PageDown,
            Key::Home,
            Key::Enter,
            Key::Erase,
            Key::Char('ä'),
            Key::Interrupt,
        ];
        assert_eq!(keys.read("q\x1b[A\x1b[B\x1bOA\x1b[6~\x1b[H\r\x7fä\x03".as_bytes()), expected);
        assert!(!keys.is_pending());
    }

    #[test]
    fn a_sequence_in_pieces_is_one_key_and_a_lone_escape_is_the_key() {
        let mut keys = Keys::default();
        for piece in [&b"\x1b"[..], b"["] {
            assert_eq!(keys.read(piece), []);
            assert!(keys.is_pending());
        }
        assert_eq!(keys.read(b"Aj"), [Key::Up, Key::Char('j')]);
        assert_eq!(keys.read(b"\x1b"), []);
        assert_eq!((keys.flush(), keys.flush()), (Some(Key::Escape), None));
        assert_eq!(keys.read(b"\x1b["), []);
        assert_eq!((keys.flush(), keys.is_pending()), (None, false));
        assert_eq!(keys.read(b"\x1b\x1b[B"), [Key::Escape, Key::Down]);
    }

    #[test]
    fn what_is_not_understood_is_dropped_whole() {
        let mut keys = Keys::default();
        assert_eq!(keys.read(b"\x1b[200~q\x1b[1;5A\x1bx\x01\xffr"), [Key::Char('q'), Key::Char('r')]);
        assert!(!keys.is_pending());
        assert_eq!(keys.read(b"\x1b[0000000000000000000000"), []);
        assert!(!keys.is_pending(), "it does not grow");
    }
}
