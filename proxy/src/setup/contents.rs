//! What is in the files that `drowse enable` writes, and what it notes there for `drowse disable`.
//!
//! PURE. Owns: their text, and the rules by which systemd reads values. Must never: decide what is written.
//!
//! Rests on: `systemd.socket(5)` and `systemd.unit(5)`: `%` begins a specifier in a unit file, a backslash at the end of
//! a line goes on with the next one; `systemd.exec(5)`, `EnvironmentFile=`: double quotes keep blanks, a backslash in
//! them is for `"`, `\`, `$` and the backtick, nothing else is expanded.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::Names;
use crate::address::Address;
use crate::config::RunOption;

/// What the first line of every file begins with. A file without it was written by somebody else.
const MARKER: &str = "# Written by `drowse enable`";
const LINK: &str = "# To be restored: ";
const ARROW: &str = " -> ";
const DIRECTORY: &str = "# Made for it: ";

/// Whether `drowse enable` wrote the file with this text.
#[must_use]
pub fn is_ours(text: &str) -> bool {
    text.starts_with(MARKER)
}

/// A symbolic link by which systemd starts a unit at boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Where it is.
    pub path: PathBuf,
    /// Where it points.
    pub target: PathBuf,
}

/// What `drowse disable` must know: kept in comments of the configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The links that started the service at boot.
    pub links: Vec<Link>,
    /// Directories that were made.
    pub directories: Vec<PathBuf>,
}

impl Record {
    /// What the text of a configuration file says.
    #[must_use]
    pub fn read(text: &str) -> Self {
        let mut record = Self::default();
        for line in text.lines() {
            if let Some((path, target)) = line.strip_prefix(LINK).and_then(|link| link.split_once(ARROW)) {
                record.links.push(Link { path: path.into(), target: target.into() });
            } else if let Some(directory) = line.strip_prefix(DIRECTORY) {
                record.directories.push(directory.into());
            }
        }
        record
    }

    fn write(&self, text: &mut String) {
        for Link { path, target } in &self.links {
            let _infallible = writeln!(text, "{LINK}{}{ARROW}{}", path.display(), target.display());
        }
        for directory in &self.directories {
            let _infallible = writeln!(text, "{DIRECTORY}{}", directory.display());
        }
    }
}

fn heading(names: &Names) -> String {
    format!("{MARKER}; `drowse disable{} {}` undoes it.\n", names.user_flag(), names.instance)
}

/// `/etc/drowse/NAME.conf`.
///
/// # Errors
/// A value cannot be written down, in one line for people.
pub fn configuration(
    names: &Names,
    record: &Record,
    backend: &Address,
    options: &[RunOption],
) -> Result<String, String> {
    let mut text = heading(names);
    record.write(&mut text);
    let mut line = |variable: &str, long: &str, value: &str| {
        let quoted = environment_value(value).map_err(|what| format!("--{long} {what}"))?;
        let _infallible = writeln!(text, "{variable}={quoted}");
        Ok::<_, String>(())
    };
    line("DROWSE_BACKEND", "backend", &backend.to_string())?;
    for option in options {
        line(&option.variable, &option.long, option.value.as_deref().unwrap_or("true"))?;
    }
    Ok(text)
}

/// A value of a file that `EnvironmentFile=` names.
fn environment_value(value: &str) -> Result<String, String> {
    if value.chars().any(char::is_control) {
        return Err("has a line break or a control character: put the text into a file of its own".to_owned());
    }
    let plain = |c: char| c.is_alphanumeric() || "_-+./:@%,=[]".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        return Ok(value.to_owned());
    }
    let mut quoted = String::from("\"");
    for c in value.chars() {
        if "\"\\$`".contains(c) {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    Ok(quoted)
}

/// A value of a file as `EnvironmentFile=` names, unquoted; nothing if the variable is not set there.
#[must_use]
pub fn variable(text: &str, name: &str) -> Option<String> {
    let value = |line: &str| Some(line.trim_start().strip_prefix(name)?.strip_prefix('=')?.trim().to_owned());
    let raw = text.lines().rev().find_map(value)?;
    for quote in ['"', '\''] {
        if let Some(inner) = raw.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)) {
            return Some(if quote == '"' { unescaped(inner) } else { inner.to_owned() });
        }
    }
    Some(raw)
}

fn unescaped(text: &str) -> String {
    let mut plain = String::new();
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        let escaped = characters.next_if(|next| c == '\\' && "\"\\$`".contains(*next));
        plain.push(escaped.unwrap_or(c));
    }
    plain
}

/// `drowse@NAME.socket.d/drowse.conf`.
///
/// # Errors
/// systemd could not listen at one of the addresses, in one line for people.
pub fn socket(names: &Names, listen: &[Address]) -> Result<String, String> {
    let mut text = heading(names) + "[Socket]\n";
    for address in listen {
        let _infallible = writeln!(text, "ListenStream={}", listen_stream(address)?);
    }
    if listen.iter().any(|address| matches!(address, Address::Unix(_))) {
        text.push_str("# Without it the file stays after the socket unit stops.\nRemoveOnStop=yes\n");
    }
    Ok(text)
}

fn listen_stream(address: &Address) -> Result<String, String> {
    let plain = match address {
        Address::Tcp { host, port } if host.is_empty() => port.to_string(),
        Address::Tcp { host, port } if address.is_name() => {
            return Err(format!(
                "--listen {address}: systemd looks no name up; write the IP address of {host}, or :{port} for all"
            ));
        }
        Address::Tcp { .. } | Address::Abstract(_) => address.to_string(),
        Address::Unix(path) => path.to_str().map(str::to_owned).ok_or_else(|| {
            format!("--listen {address}: systemd takes no path that is not UTF-8; choose another")
        })?,
    };
    if plain.chars().any(char::is_control) || plain.ends_with('\\') || plain.trim() != plain {
        return Err(format!(
            "--listen {address}: a unit file cannot hold a control character, or a blank or a backslash at the end; \
             choose another name"
        ));
    }
    Ok(plain.replace('%', "%%"))
}

/// What of the sandbox of `drowse@.service` keeps drowse from its backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hindrances {
    /// Addresses of the backend that are not on this machine's loopback interface.
    pub addresses: Vec<IpAddr>,
    /// The backend's unix socket, unless everybody may connect to it.
    pub closed_socket: Option<PathBuf>,
    /// The backend's unix socket, whoever may connect to it.
    pub socket: Option<PathBuf>,
}

/// `drowse@NAME.service.d/drowse.conf`; nothing if the unit is right as it is.
#[must_use]
pub fn service(names: &Names, hindrances: &Hindrances) -> Option<String> {
    let mut settings = String::new();
    for address in &hindrances.addresses {
        let _infallible = writeln!(settings, "IPAddressAllow={address}");
    }
    if let Some(path) = &hindrances.socket {
        let is_below = |directories: &[&str]| directories.iter().any(|directory| path.starts_with(directory));
        if is_below(&["/tmp", "/var/tmp"]) {
            settings.push_str("# The backend's socket is there.\nPrivateTmp=no\n");
        }
        if is_below(&["/home", "/root", "/run/user"]) {
            settings.push_str("# The backend's socket is there.\nProtectHome=read-only\n");
        }
    }
    if hindrances.closed_socket.is_some() {
        settings.push_str(
            "# Connecting needs write permission on the backend's socket and a way through its directories.\n\
             CapabilityBoundingSet=CAP_DAC_OVERRIDE\nAmbientCapabilities=CAP_DAC_OVERRIDE\n",
        );
    }
    (!settings.is_empty()).then(|| heading(names) + "[Service]\n" + &settings)
}

/// Whether a unit file sets `setting`.
#[must_use]
pub fn sets(text: &str, setting: &str) -> bool {
    text.lines().any(|line| {
        line.trim_start().strip_prefix(setting).is_some_and(|rest| rest.trim_start().starts_with('='))
    })
}

/// Whether `path` is one of a drop-in that systemd reads.
#[must_use]
pub fn is_drop_in(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "conf")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    fn web() -> Names {
        Names::new("web", false).unwrap()
    }

    #[test]
    fn values_come_back_as_they_went() {
        for value in
            ["15min", "2h 30s", "", "a\"b\\c$d`e", "pgrep -f 'x y' # no %i", "\\", "  both ends  ", "'", "Ü"]
        {
            let text = format!("X=1\nDROWSE_Y={}\n", environment_value(value).unwrap());
            assert_eq!(variable(&text, "DROWSE_Y").as_deref(), Some(value), "{text}");
        }
        assert_eq!(environment_value("127.0.0.1:8081").unwrap(), "127.0.0.1:8081");
        assert_eq!(environment_value("http:/a?b=$c").unwrap(), "\"http:/a?b=\\$c\"");
        assert!(environment_value("a\nb").is_err());
        assert_eq!(variable("A=1\nA=2", "A").as_deref(), Some("2"), "the last one holds");
        assert_eq!(variable("# A=1\nAB=2", "A"), None);
    }

    #[test]
    fn listeners_are_written_as_systemd_reads_them() {
        let text = socket(&web(), &[":80", "127.0.0.1:81", "[::1]:82", "/run/50% off", "@web"].map(address));
        let listens: Vec<_> =
            text.as_ref().unwrap().lines().filter_map(|line| line.strip_prefix("ListenStream=")).collect();
        assert_eq!(listens, ["80", "127.0.0.1:81", "[::1]:82", "/run/50%% off", "@web"]);
        assert!(text.unwrap().contains("RemoveOnStop=yes"));
        for wrong in ["localhost:80", "/run/a\nExecStart=x", "/run/back\\", "/run/blank "] {
            assert!(socket(&web(), &[address(wrong)]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_record_is_kept_in_comments() {
        let record = Record {
            links: vec![Link { path: "/etc/a.wants/web.service".into(), target: "/lib/web.service".into() }],
            directories: vec!["/etc/drowse".into()],
        };
        let options = [RunOption {
            long: "idle-time".into(),
            variable: "DROWSE_IDLE_TIME".into(),
            value: Some("2h 30s".into()),
        }];
        let text = configuration(&web(), &record, &address(":8081"), &options).unwrap();
        assert!(is_ours(&text) && !is_ours("DROWSE_BACKEND=:8081\n"));
        assert_eq!(Record::read(&text), record);
        assert!(text.contains("`drowse disable web` undoes it"), "{text}");
        let users = Names { user: true, ..web() };
        assert!(socket(&users, &[]).unwrap().contains("`drowse disable --user web` undoes it"));
        assert!(text.ends_with("DROWSE_BACKEND=:8081\nDROWSE_IDLE_TIME=\"2h 30s\"\n"), "{text}");
    }

    #[test]
    fn the_sandbox_is_opened_only_where_it_must_be() {
        assert_eq!(service(&web(), &Hindrances::default()), None);
        let remote = Hindrances { addresses: vec!["10.1.2.3".parse().unwrap()], ..Hindrances::default() };
        assert!(service(&web(), &remote).unwrap().ends_with("[Service]\nIPAddressAllow=10.1.2.3\n"));
        for (path, setting) in [("/tmp/x", "PrivateTmp=no"), ("/home/a/x", "ProtectHome=read-only")] {
            let hidden = Hindrances { socket: Some(path.into()), ..Hindrances::default() };
            assert!(service(&web(), &hidden).unwrap().ends_with(&format!("{setting}\n")), "{path}");
        }
        let open = Hindrances { socket: Some("/run/x".into()), ..Hindrances::default() };
        assert_eq!(service(&web(), &open), None);
        let closed = Hindrances { closed_socket: Some("/run/x".into()), ..open };
        for setting in ["CapabilityBoundingSet=CAP_DAC_OVERRIDE\n", "AmbientCapabilities=CAP_DAC_OVERRIDE\n"]
        {
            assert!(service(&web(), &closed).unwrap().contains(setting));
        }
    }

    #[test]
    fn a_setting_is_found_in_a_unit_file() {
        assert!(sets("[Socket]\n ListenStream = 80\n", "ListenStream"));
        assert!(!sets("#ListenStream=80\nListenStreams=1", "ListenStream"));
    }
}
