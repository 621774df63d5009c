//! `cargo xtask dist`: a Debian package and a tarball in `target/dist/`.
//!
//! Owns: what is installed where, and the package's metadata; its maintainer scripts are in `xtask/debian/`. Must never:
//! put anything into them that differs from one run to the next: times are `SOURCE_DATE_EPOCH` or the last commit's.
//! Rests on: `dpkg-deb` takes the times of its own files from `SOURCE_DATE_EPOCH` (dpkg 1.18.8).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};
use std::{env, io};

use anyhow::{Context as _, bail, ensure};

use crate::{build_ebpf, install, process, say, workspace};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The stripped program with its eBPF object is no larger.
const BINARY_BYTES_MAX: u64 = 8_000_000;
const DOCUMENTS: &str = "usr/share/doc/drowse";
const MANUAL_PAGES: &str = "usr/share/man/man1";
/// Where a shell looks for a package's completions.
const COMPLETIONS: [(&str, &str); 3] = [
    ("drowse.bash", "usr/share/bash-completion/completions/drowse"),
    ("_drowse", "usr/share/zsh/vendor-completions/_drowse"),
    ("drowse.fish", "usr/share/fish/vendor_completions.d/drowse.fish"),
];
/// A library that the program may need, and its Debian package.
const LIBRARIES: [(&str, &str); 4] =
    [("libc.so.", "libc6"), ("libm.so.", "libc6"), ("ld-linux", "libc6"), ("libgcc_s.so.", "libgcc-s1")];
const CONTROL: &str = include_str!("../debian/control");
/// The functions that each maintainer script begins with.
const COMMON: &str = include_str!("../debian/common.sh");
const SCRIPTS: [(&str, &str); 3] = [
    ("postinst", include_str!("../debian/postinst")),
    ("prerm", include_str!("../debian/prerm")),
    ("postrm", include_str!("../debian/postrm")),
];
/// Its indented lines are commands.
const INSTALL: &str = "\
To install or to upgrade, as root in this directory:

    cp -r --preserve=mode --remove-destination usr/. /usr/
    systemd-sysusers
    systemctl daemon-reload
    systemctl try-restart 'drowse@*.service'

Then follow /usr/share/doc/drowse/units/README.md. To remove it, as root in this directory:

    systemctl stop 'drowse@*.socket' 'drowse@*.service'
    rm -f /etc/systemd/system/*.wants/drowse@*
    find usr -type f -printf '/%p\\0' | xargs -0 rm -f
    rm -rf /usr/share/doc/drowse /run/drowse /sys/fs/bpf/drowse
    systemctl daemon-reload
";

/// Builds everything and packs it.
pub fn run() -> anyhow::Result<()> {
    build_ebpf::run()?;
    say("building drowse, optimised");
    process::run(Command::new("cargo").args([
        "build",
        "--release",
        "--quiet",
        "--locked",
        "--package",
        "drowse",
    ]))?;

    let epoch = epoch()?;
    let dist = workspace().join("target/dist");
    remove(&dist)?;
    let tree = dist.join("tree");
    program(&tree)?;
    manual(&dist.join("manual"), &tree, epoch)?;
    units(&tree)?;
    documents(&tree)?;

    let mut made = vec![tarball(&dist, &tree, epoch)?];
    match process::find("dpkg-deb") {
        Some(dpkg_deb) => made.push(package(&dpkg_deb, &dist, &tree, epoch)?),
        None => say("no dpkg-deb here: there is only the tarball"),
    }
    remove(&tree)?;
    remove(&dist.join("manual"))?;
    remove(&dist.join("INSTALL"))?;
    for file in made {
        say(&format!("{}, {} bytes", file.display(), fs::metadata(&file)?.len()));
    }
    Ok(())
}

/// The time that all files get, in seconds since 1970.
fn epoch() -> anyhow::Result<u64> {
    if let Some(epoch) = env::var_os("SOURCE_DATE_EPOCH") {
        let epoch = epoch.to_string_lossy();
        return epoch.parse().with_context(|| format!("understand SOURCE_DATE_EPOCH={epoch}"));
    }
    let commit =
        process::output(Command::new("git").args(["log", "-1", "--format=%ct"]).current_dir(workspace()))?;
    let commit =
        commit.context("no time for the files: this is no git repository, so set SOURCE_DATE_EPOCH")?;
    commit.parse().with_context(|| format!("understand the time of the last commit, {commit}"))
}

/// The stripped program, which must have the eBPF object in it.
fn program(tree: &Path) -> anyhow::Result<()> {
    let root = workspace();
    let program = tree.join("usr/bin/drowse");
    copy(&root.join("target/release/drowse"), &program)?;
    let strip = install::program("strip", "binutils")?;
    process::run(Command::new(strip).arg("--strip-all").arg(&program))?;

    let bytes = fs::read(&program).context("read the stripped program")?;
    let object = root.join("target/ebpf/drowse.o");
    let object = fs::read(&object).with_context(|| format!("read {}", object.display()))?;
    ensure!(
        !object.is_empty() && bytes.windows(object.len()).any(|part| part == object),
        "the program was built without the eBPF object target/ebpf/drowse.o: run `touch proxy/build.rs` and this again"
    );
    let length = fs::metadata(&program)?.len();
    ensure!(
        length <= BINARY_BYTES_MAX,
        "the stripped program has {length} bytes, more than {BINARY_BYTES_MAX}: see what became larger with cargo-bloat"
    );
    say(&format!("the stripped program: {length} bytes, of which the eBPF object has {}", object.len()));
    Ok(())
}

/// Man pages and completions, as the program's own command line has them.
fn manual(made: &Path, tree: &Path, epoch: u64) -> anyhow::Result<()> {
    say("man pages and completions");
    let date = process::output(Command::new("date").args(["-u", "-d", &format!("@{epoch}"), "+%F"]))?;
    // Of the whole workspace, as the tests are built: a package by itself is built with other features, so again.
    let build = ["build", "--quiet", "--locked", "--workspace", "--example", "manual"];
    process::run(Command::new("cargo").args(build))?;
    let mut write = Command::new(workspace().join("target/debug/examples/manual"));
    process::run(write.arg(made).arg(date.context("date failed")?))?;
    for (name, place) in COMPLETIONS {
        copy(&made.join(name), &tree.join(place))?;
    }
    for page in files(made)?.iter().filter(|file| file.extension().is_some_and(|end| end == "1")) {
        let place = tree.join(MANUAL_PAGES).join(page);
        copy(&made.join(page), &place)?;
        compress(&place)?;
    }
    Ok(())
}

/// Everything below `units/`.
fn units(tree: &Path) -> anyhow::Result<()> {
    let units = workspace().join("units");
    for file in files(&units)? {
        let place = unit_place(&file)?;
        copy(&units.join(&file), &tree.join(place))?;
    }
    Ok(())
}

/// Where a file below `units/` goes.
fn unit_place(file: &Path) -> anyhow::Result<PathBuf> {
    let first = file.iter().next().unwrap_or_default().to_string_lossy();
    Ok(match first.as_ref() {
        "user" => Path::new("usr/lib/systemd").join(file),
        "sysusers.d" => Path::new("usr/lib").join(file),
        "polkit-1" => Path::new("usr/share").join(file),
        "examples" => Path::new(DOCUMENTS).join(file),
        "README.md" => Path::new(DOCUMENTS).join("units").join(file),
        name if name.starts_with("drowse@.") => Path::new("usr/lib/systemd/system").join(file),
        _ => bail!("no place for units/{}: say in xtask/src/dist.rs where it goes", file.display()),
    })
}

/// What there is to read, with all licences.
fn documents(tree: &Path) -> anyhow::Result<()> {
    let root = workspace();
    let documents = tree.join(DOCUMENTS);
    for directory in ["docs", "contrib"].map(PathBuf::from) {
        for file in files(&root.join(&directory))? {
            copy(&root.join(&directory).join(&file), &documents.join(&directory).join(&file))?;
        }
    }
    for name in ["README.md", "CHANGELOG.md", "LICENSE-APACHE"] {
        copy(&root.join(name), &documents.join(name))?;
    }
    let mit = fs::read_to_string(root.join("LICENSE-MIT")).context("read LICENSE-MIT")?;
    let copyright = format!(
        "drowse may be used under either of two licences, MIT or Apache-2.0.\n\nApache-2.0 is in LICENSE-APACHE beside \
         this file and, on Debian, in /usr/share/common-licenses/Apache-2.0.\nThose of the crates in the program are \
         in third-party.txt.gz.\n\n{mit}"
    );
    write(&documents.join("copyright"), &copyright)?;
    let third_party = documents.join("third-party.txt");
    write(&third_party, &third_party_licences()?)?;
    compress(&third_party)
}

/// The licence of each crate that is in the program or in the eBPF object, with its texts.
fn third_party_licences() -> anyhow::Result<String> {
    let mut tree = Command::new("cargo");
    tree.args([
        "tree",
        "--locked",
        "--package",
        "drowse",
        "--package",
        "drowse-ebpf",
        "--features",
        "programs,user",
    ]);
    tree.args(["--edges", "normal,no-proc-macro", "--prefix", "none", "--no-dedupe", "--format", "{p}|{l}"]);
    let listed = process::output(tree.current_dir(workspace()))?.context("cargo tree failed")?;
    let crates: BTreeSet<_> =
        listed.lines().filter(|line| line.contains('|') && !line.contains(" (")).collect();
    let sources = registry_sources()?;

    let mut text = "The Rust standard library: MIT OR Apache-2.0, https://www.rust-lang.org\n".to_owned();
    for line in crates {
        let (package, licence) = line.split_once('|').with_context(|| format!("understand {line}"))?;
        writeln!(text, "\n{package}: {licence}")?;
        let directory = package.replacen(" v", "-", 1);
        let source = sources.iter().map(|source| source.join(&directory)).find(|source| source.is_dir());
        let source =
            source.with_context(|| format!("no source of {package} in {sources:?}: run `cargo fetch`"))?;
        let is_licence = |file: &&PathBuf| {
            let name = file.to_string_lossy().to_uppercase();
            ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"]
                .iter()
                .any(|start| name.starts_with(start))
        };
        for file in files(&source)?.iter().filter(is_licence) {
            let contents =
                fs::read(source.join(file)).with_context(|| format!("read a licence of {package}"))?;
            writeln!(text, "--- {}\n{}", file.display(), String::from_utf8_lossy(&contents))?;
        }
    }
    Ok(text)
}

/// Where cargo keeps the sources of crates.
fn registry_sources() -> anyhow::Result<Vec<PathBuf>> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo")));
    let sources = home.context("neither CARGO_HOME nor HOME is set")?.join("registry/src");
    let entries = fs::read_dir(&sources).with_context(|| format!("read {}", sources.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// The Debian packages that the program needs.
fn needs(program: &Path) -> anyhow::Result<String> {
    let objdump = install::program("objdump", "binutils")?;
    let headers = process::output(Command::new(objdump).arg("-p").arg(program))?.context("objdump failed")?;
    dependencies(&headers)
}

/// The Debian packages of the libraries in `objdump -p`, with the newest version that a symbol of each is from.
fn dependencies(headers: &str) -> anyhow::Result<String> {
    let package = |library: &str| {
        let known = LIBRARIES.iter().find(|(start, _)| library.starts_with(start));
        let message = || format!("{library} is new: add its package to LIBRARIES in xtask/src/dist.rs");
        known.map(|(_, package)| *package).with_context(message)
    };
    let mut versions: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    let mut of = None;
    for line in headers.lines().map(str::trim) {
        if let Some(library) = line.strip_prefix("NEEDED") {
            versions.entry(package(library.trim())?).or_default();
        } else if let Some(library) = line.strip_prefix("required from ") {
            of = Some(package(library)?);
        } else if let (Some(package), Some((_, symbols))) = (of, line.rsplit_once(' ')) {
            let (_, version) = symbols.split_once('_').with_context(|| format!("understand {line}"))?;
            let version: Result<Vec<u32>, _> = version.split('.').map(str::parse).collect();
            let version = version.with_context(|| format!("understand the version in {line}"))?;
            let newest = versions.entry(package).or_default();
            *newest = version.max(std::mem::take(newest));
        }
    }
    ensure!(!versions.is_empty(), "objdump shows no library that the program needs");
    let depend = |(package, version): (&str, Vec<u32>)| {
        let version: Vec<_> = version.iter().map(u32::to_string).collect();
        if version.is_empty() { package.to_owned() } else { format!("{package} (>= {})", version.join(".")) }
    };
    Ok(versions.into_iter().map(depend).collect::<Vec<_>>().join(", "))
}

fn tarball(dist: &Path, tree: &Path, epoch: u64) -> anyhow::Result<PathBuf> {
    let name = format!("drowse-{VERSION}-{}", env::consts::ARCH);
    write(&dist.join("INSTALL"), INSTALL)?;
    seal(tree, epoch)?;
    let file = dist.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.args(["--create", "--format=ustar", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.args(["--mode=u=rwX,go=rX", &format!("--mtime=@{epoch}"), &format!("--transform=s,^,{name}/,")]);
    tar.args(["--use-compress-program=gzip -9n", "--file"]).arg(&file);
    process::run(tar.arg("--directory").arg(dist).arg("INSTALL").arg("--directory").arg(tree).arg("usr"))?;
    Ok(file)
}

fn package(dpkg_deb: &Path, dist: &Path, tree: &Path, epoch: u64) -> anyhow::Result<PathBuf> {
    let architecture = process::output(Command::new("dpkg").arg("--print-architecture"))?;
    let architecture = architecture.context("dpkg does not know this machine's architecture")?;
    let files = files(tree)?;
    let mut bytes = 0;
    for file in &files {
        bytes += fs::metadata(tree.join(file))?.len();
    }
    let sums =
        process::output(Command::new("md5sum").args(&files).current_dir(tree))?.context("md5sum failed")?;

    let control = CONTROL
        .replace("@VERSION@", VERSION)
        .replace("@ARCHITECTURE@", &architecture)
        .replace("@KIBIBYTES@", &bytes.div_ceil(1024).to_string())
        .replace("@DEPENDS@", &needs(&tree.join("usr/bin/drowse"))?);
    let debian = tree.join("DEBIAN");
    write(&debian.join("control"), &control)?;
    write(&debian.join("md5sums"), &(sums + "\n"))?;
    for (name, body) in SCRIPTS {
        let script = debian.join(name);
        write(&script, &format!("{COMMON}{body}"))?;
        fs::set_permissions(&script, Permissions::from_mode(0o755))?;
    }
    fs::create_dir_all(tree.join("etc/drowse")).context("make etc/drowse")?;
    seal(tree, epoch)?;

    let file = dist.join(format!("drowse_{VERSION}_{architecture}.deb"));
    let mut build = Command::new(dpkg_deb);
    // More threads make other blocks.
    build.env("SOURCE_DATE_EPOCH", epoch.to_string()).env("DPKG_DEB_THREADS_MAX", "1");
    build.args(["--root-owner-group", "-Zxz", "--build"]).arg(tree).arg(&file);
    process::run(&mut build)?;
    Ok(file)
}

/// Gives every file and directory its mode and its time, whatever the umask and the clock are.
fn seal(path: &Path, epoch: u64) -> anyhow::Result<()> {
    let metadata = fs::metadata(path).with_context(|| format!("look at {}", path.display()))?;
    if metadata.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("read {}", path.display()))? {
            seal(&entry?.path(), epoch)?;
        }
    }
    let mode = if metadata.is_dir() || metadata.permissions().mode() & 0o100 != 0 { 0o755 } else { 0o644 };
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(epoch);
    let timed = File::open(path).and_then(|file| file.set_modified(time));
    timed.with_context(|| format!("set the time of {}", path.display()))
}

/// All files below `directory`, relative to it and sorted. None if it does not exist.
fn files(directory: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(relative) = waiting.pop() {
        let entries = match fs::read_dir(directory.join(&relative)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.with_context(|| format!("read {}", directory.join(&relative).display()))?,
        };
        for entry in entries {
            let entry = entry?;
            let path = relative.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                waiting.push(path);
            } else {
                found.insert(path);
            }
        }
    }
    Ok(found)
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    make_parent(to)?;
    fs::copy(from, to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn write(to: &Path, contents: &str) -> anyhow::Result<()> {
    make_parent(to)?;
    fs::write(to, contents).with_context(|| format!("write {}", to.display()))
}

fn make_parent(file: &Path) -> anyhow::Result<()> {
    let parent = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))
}

/// Makes `file` into `file.gz`, without its name and time.
fn compress(file: &Path) -> anyhow::Result<()> {
    process::run(Command::new("gzip").args(["-9n", "--force"]).arg(file))
}

/// Removes a file or a directory with all that is in it, if it is there.
fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_below_units_has_a_place() {
        let place = |file: &str| unit_place(Path::new(file)).ok().map(|place| place.display().to_string());
        for (file, expected) in [
            ("drowse@.service", "usr/lib/systemd/system/drowse@.service"),
            ("user/drowse@.socket", "usr/lib/systemd/user/drowse@.socket"),
            ("sysusers.d/drowse.conf", "usr/lib/sysusers.d/drowse.conf"),
            ("polkit-1/rules.d/50-drowse.rules", "usr/share/polkit-1/rules.d/50-drowse.rules"),
            ("examples/dice/dice.py", "usr/share/doc/drowse/examples/dice/dice.py"),
            ("README.md", "usr/share/doc/drowse/units/README.md"),
        ] {
            assert_eq!(place(file).as_deref(), Some(expected));
        }
        assert_eq!(place("new/thing"), None);
        for file in files(&workspace().join("units")).unwrap() {
            unit_place(&file).unwrap();
        }
    }

    #[test]
    fn packages_come_from_the_libraries_versions() {
        let headers = "Dynamic Section:\n  NEEDED               libgcc_s.so.1\n  NEEDED               libc.so.6\n\n\
            Version References:\n  required from libgcc_s.so.1:\n    0x0b792650 0x00 05 GCC_3.0\n\
            \x20 required from libc.so.6:\n    0x09691a75 0x00 03 GLIBC_2.34\n    0x09691a75 0x00 04 GLIBC_2.4\n";
        assert_eq!(dependencies(headers).unwrap(), "libc6 (>= 2.34), libgcc-s1 (>= 3.0)");
        assert_eq!(dependencies("NEEDED libc.so.6").unwrap(), "libc6");
        assert!(dependencies("NEEDED libssl.so.3").is_err());
        assert!(dependencies("").is_err());
    }
}
