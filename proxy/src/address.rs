//! Addresses as users write them: `HOST:PORT`, `[v6]:PORT`, `:PORT`, `/path`, `@abstract`.
//!
//! Owns: the notation, and turning it into socket addresses.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use socket2::SockAddr;

/// An address to listen on or to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A TCP port of a host; no host means every address of this machine (listener) or this machine (backend).
    Tcp {
        /// A name or an IP address; empty when only a port was given.
        host: String,
        /// The port, never 0.
        port: u16,
    },
    /// A unix socket in the file system.
    Unix(PathBuf),
    /// A unix socket in the abstract namespace (without its leading NUL).
    Abstract(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(name) = text.strip_prefix('@') {
            return if name.is_empty() {
                Err("'@' needs a name".into())
            } else {
                Ok(Self::Abstract(name.into()))
            };
        }
        if text.starts_with('/') {
            return Ok(Self::Unix(text.into()));
        }
        let expected = "expected HOST:PORT, [V6]:PORT, :PORT, /path or @abstract";
        let Some((host, port)) = text.rsplit_once(':') else {
            return Err(format!("'{text}' has no port; {expected}"));
        };
        let port = match port.parse() {
            Ok(0) | Err(_) => return Err(format!("'{port}' is no port (1 to 65535); {expected}")),
            Ok(port) => port,
        };
        let host = match host.strip_prefix('[') {
            Some(rest) => {
                let inner = rest.strip_suffix(']').ok_or_else(|| format!("'[' without ']'; {expected}"))?;
                inner.parse::<Ipv6Addr>().map_err(|_| format!("'{inner}' is no IPv6 address"))?;
                inner
            }
            None if host.contains(':') => return Err(format!("write IPv6 as [{host}]:{port}")),
            None => host,
        };
        Ok(Self::Tcp { host: host.into(), port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Abstract(name) => write!(f, "@{name}"),
        }
    }
}

impl Address {
    /// The TCP port, if it is a TCP address.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp { port, .. } => Some(*port),
            Self::Unix(_) | Self::Abstract(_) => None,
        }
    }

    /// Whether it has to be looked up.
    #[must_use]
    pub fn is_name(&self) -> bool {
        matches!(self, Self::Tcp { host, .. } if !host.is_empty() && host.parse::<IpAddr>().is_err())
    }

    /// The socket addresses to try when connecting, in order. Names are resolved each time, because they change.
    ///
    /// # Errors
    /// The name does not resolve, or the path is longer than a unix address allows (107 bytes).
    pub async fn resolve(&self) -> io::Result<Vec<SockAddr>> {
        match self {
            Self::Tcp { host, port } if host.is_empty() => {
                Ok(vec![SocketAddr::from(([127, 0, 0, 1], *port)).into(), loopback_v6(*port).into()])
            }
            Self::Tcp { host, port } => match host.parse::<IpAddr>() {
                Ok(ip) => Ok(vec![SocketAddr::from((ip, *port)).into()]),
                Err(_) => {
                    Ok(tokio::net::lookup_host((host.as_str(), *port)).await?.map(Into::into).collect())
                }
            },
            Self::Unix(path) => Ok(vec![SockAddr::unix(path)?]),
            Self::Abstract(name) => Ok(vec![abstract_address(name)?]),
        }
    }

    /// The socket addresses to listen on. No host means every address, IPv4 and IPv6 on one socket.
    ///
    /// # Errors
    /// As [`Address::resolve`].
    pub async fn resolve_to_listen(&self) -> io::Result<Vec<SockAddr>> {
        match self {
            Self::Tcp { host, port } if host.is_empty() => {
                Ok(vec![SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port)).into()])
            }
            Self::Tcp { .. } | Self::Unix(_) | Self::Abstract(_) => self.resolve().await,
        }
    }
}

fn loopback_v6(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv6Addr::LOCALHOST, port))
}

fn abstract_address(name: &str) -> io::Result<SockAddr> {
    std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    SockAddr::unix(std::ffi::OsStr::from_bytes(&[&[0], name.as_bytes()].concat()))
}

/// A socket address as people write it.
#[must_use]
pub fn display(address: &SockAddr) -> String {
    if let Some(inet) = address.as_socket() {
        inet.to_string()
    } else if let Some(path) = address.as_pathname() {
        path.display().to_string()
    } else if let Some(name) = address.as_abstract_namespace() {
        format!("@{}", String::from_utf8_lossy(name))
    } else {
        "unnamed".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_notation_is_read_and_written_back() {
        for text in ["127.0.0.1:80", "localhost:8080", ":80", "[::1]:443", "/run/dice.sock", "@dice"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, hint) in [
            ("8080", "no port"),
            ("host:", "no port (1"),
            ("host:0", "no port (1"),
            ("host:65536", "no port (1"),
            ("::1:80", "[::1]:80"),
            ("[::1:80", "without"),
            ("[host]:80", "no IPv6"),
            ("@", "needs a name"),
            ("", "no port"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[tokio::test]
    async fn an_abstract_name_keeps_its_bytes() {
        let resolved = "@dice".parse::<Address>().unwrap().resolve().await.unwrap();
        assert_eq!(resolved[0].as_abstract_namespace(), Some(b"dice".as_slice()));
        assert_eq!(display(&resolved[0]), "@dice");
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_is_an_error() {
        let long = format!("/{}", "x".repeat(200)).parse::<Address>().unwrap();
        assert!(long.resolve().await.is_err());
    }
}
