//! Every command that a document tells its readers to run, run under a booted systemd in which drowse is installed.
//!
//! Each document has a systemd of its own and is read from its top to its end, in a directory that looks like a checkout
//! of this repository. `sh` blocks are scripts; a `console` block shows commands behind `#` (root) or `$` (an ordinary
//! user who is logged in) and what they print; a block that begins with `# /PATH` or `# ~/PATH` is that file. An HTML
//! comment directly before a block says otherwise:
//!
//! - `<!-- background -->`: the command runs until the end of the document;
//! - `<!-- run by: another test -->`: each of its lines is in [`ELSEWHERE`];
//! - `<!-- run by: nobody, needs PROGRAM -->`: one of [`NOT_HERE`].
//!
//! What a document takes for granted and is not there is in `tests/stand-ins/`, below a directory of the document's name,
//! and copied into the root beforehand.

#![expect(clippy::print_stdout, reason = "what was run is what a failed test shows")]

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use anyhow::{Context, Result, bail, ensure};
use drowse_tests::markdown::{Block, Who, compare, files, parse, typed};
use drowse_tests::service::{Installation, SOON, with_drowse_on};
use drowse_tests::systemd::{Options, Systemd};
use drowse_tests::workspace;

const ECHO: &str = env!("CARGO_BIN_EXE_echo-backend");
/// Where the repository is seen.
const CHECKOUT: &str = "/src/drowse";
/// The ordinary user, and its number.
const PERSON: &str = "alice";
const PERSON_UID: &str = "4711";

/// Commands that cannot run there, and the proof that something else runs them: a file, and a piece of its text.
const ELSEWHERE: [(&str, &str, &str); 4] = [
    ("cargo xtask demo", "tests/tests/ring1_demo.rs", r#"["xtask", "demo"]"#),
    ("cargo xtask test", ".ci/run", "\ncargo xtask test\n"),
    ("cargo xtask dist", "xtask/src/test.rs", "dist::run()"),
    (
        "apt install ./target/dist/drowse_*.deb",
        "tests/tests/ring3_package.rs",
        r#"dpkg(systemd, "--install""#,
    ),
];
/// Programs that `cargo xtask test` does not install.
const NOT_HERE: [&str; 1] = ["podman"];

macro_rules! documents {
    ($($test:ident: $path:literal,)*) => {
        const DOCUMENTS: &[&str] = &[$($path),*];
        $(
            #[test]
            fn $test() -> Result<()> {
                run_document($path)
            }
        )*
    };
}

documents! {
    the_readme: "README.md",
    the_readme_of_the_units: "units/README.md",
    the_tutorial: "docs/tutorial.md",
    how_to_database: "docs/how-to/database.md",
    how_to_game_server: "docs/how-to/game-server.md",
    how_to_podman: "docs/how-to/podman.md",
    how_to_user_services: "docs/how-to/user-services.md",
}

#[test]
fn no_how_to_is_forgotten() -> Result<()> {
    for entry in fs::read_dir(workspace().join("docs/how-to")).context("look at the how-tos")? {
        let path = entry?.path();
        let path = path.strip_prefix(workspace())?.to_string_lossy().into_owned();
        ensure!(DOCUMENTS.contains(&path.as_str()), "{path} is run by no test");
    }
    Ok(())
}

#[test]
fn what_is_run_elsewhere_really_is() -> Result<()> {
    for (command, path, text) in ELSEWHERE {
        let there = fs::read_to_string(workspace().join(path)).with_context(|| format!("read {path}"))?;
        ensure!(there.contains(text), "{path} does not run {command}: there is no {text:?} in it");
    }
    let installs = fs::read_to_string(workspace().join("xtask/src/install.rs"))?;
    for program in NOT_HERE {
        ensure!(
            !installs.contains(&format!("\"{program}\"")),
            "{program} is installed for the tests: use it"
        );
    }
    Ok(())
}

fn run_document(path: &str) -> Result<()> {
    let text = fs::read_to_string(workspace().join(path)).with_context(|| format!("read {path}"))?;
    let blocks = parse(&text).blocks;
    ensure!(!blocks.is_empty(), "{path} has no block to run");
    let options = Options::new().bind(workspace(), CHECKOUT).keep("systemd-logind.service");
    with_drowse_on(options, ECHO, |installation| {
        let systemd = &installation.systemd;
        systemd.call(["mount", "-o", "remount,bind,ro", CHECKOUT])?;
        for unit in ["drowse@.socket", "drowse@.service"] {
            let place = format!("/usr/lib/systemd/user/{unit}");
            systemd.install(workspace().join("units/user").join(unit), &place)?;
        }
        stand_ins(systemd, path)?;
        let mut reader = Reader { installation, has_person: false, background: Vec::new() };
        for block in &blocks {
            reader.block(block).with_context(|| format!("{path}:{}", block.line))?;
        }
        reader.finish()
    })
}

/// Copies what stands in for things that a document takes for granted into the root.
fn stand_ins(systemd: &Systemd, document: &str) -> Result<()> {
    let root = workspace().join("tests/stand-ins").join(document.trim_end_matches(".md"));
    let mut left: Vec<PathBuf> = vec![root.clone()];
    while let Some(directory) = left.pop() {
        if !directory.exists() {
            continue;
        }
        for entry in fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else {
                systemd.install(&path, &format!("/{}", path.strip_prefix(&root)?.display()))?;
            }
        }
    }
    systemd.systemctl(["daemon-reload"]).map(drop)
}

/// Who reads a document and does what it says.
struct Reader<'a> {
    installation: &'a Installation,
    has_person: bool,
    background: Vec<String>,
}

impl Reader<'_> {
    /// Does what a block says.
    fn block(&mut self, block: &Block) -> Result<()> {
        let files = files(block);
        match (block.language.as_str(), block.mark.as_deref()) {
            (_, Some(mark)) if mark.starts_with("run by: ") => is_excused(block, mark),
            (language, None) if language != "console" && !files.is_empty() => {
                files.iter().try_for_each(|(path, text)| self.write(path, text))
            }
            ("sh", Some("background")) => self.start(&block.text),
            ("sh", None) => self.run(Who::Root, &block.text).map(drop),
            ("console", None) => {
                for typed in typed(block)? {
                    let output = self.run(typed.who, &typed.command)?;
                    compare(&typed.output, &output).with_context(|| typed.command.clone())?;
                }
                Ok(())
            }
            ("text", None) => Ok(()),
            (language, mark) => {
                bail!("a block of {language:?} with the mark {mark:?} is neither run nor excused")
            }
        }
    }

    /// Runs a script, which must succeed. Returns what it wrote to its outputs.
    fn run(&mut self, who: Who, script: &str) -> Result<String> {
        let prompt = if who == Who::Root { '#' } else { '$' };
        println!("{prompt} {}", script.trim_end());
        let Output { status, stdout, .. } = self.shell(who, script)?;
        let output = String::from_utf8(stdout).context("read what it wrote")?;
        print!("{output}");
        ensure!(status.success(), "{status}: {script}\n{output}");
        Ok(output)
    }

    fn shell(&mut self, who: Who, script: &str) -> Result<Output> {
        let script = format!("exec 2>&1\n{script}");
        let bash = ["bash", "-euo", "pipefail", "-c", script.as_str()];
        match who {
            Who::Root => {
                let place = ["env", "-C", CHECKOUT, "HOME=/root", "USER=root"];
                self.installation.systemd.run(place.into_iter().chain(bash))
            }
            Who::Person => {
                self.person()?;
                let home = format!("/home/{PERSON}");
                let variables = [format!("HOME={home}"), format!("USER={PERSON}")];
                let session = format!("XDG_RUNTIME_DIR=/run/user/{PERSON_UID}");
                let become_person =
                    ["setpriv", "--reuid", PERSON_UID, "--regid", PERSON_UID, "--clear-groups"];
                let place =
                    ["env", "-C", &home, &session].into_iter().chain(variables.iter().map(String::as_str));
                self.installation.systemd.run(become_person.into_iter().chain(place).chain(bash))
            }
        }
    }

    /// An ordinary user who is logged in.
    fn person(&mut self) -> Result<()> {
        if self.has_person {
            return Ok(());
        }
        let systemd = &self.installation.systemd;
        let uid = format!("--uid={PERSON_UID}");
        let low = format!("--key=GID_MIN={PERSON_UID}");
        systemd.call([
            "useradd",
            &uid,
            "--user-group",
            &low,
            "--create-home",
            "--shell=/bin/bash",
            PERSON,
        ])?;
        // A stand-in may be there already.
        systemd.call(["chown", "-R", &format!("{PERSON}:"), &format!("/home/{PERSON}")])?;
        systemd.systemctl(["start", &format!("user@{PERSON_UID}.service")])?;
        self.has_person = true;
        Ok(())
    }

    fn write(&mut self, path: &str, text: &str) -> Result<()> {
        println!("(write {path})");
        let Some(below_home) = path.strip_prefix("~/") else {
            return self.installation.systemd.write(path, text);
        };
        self.person()?;
        let home = format!("/home/{PERSON}");
        self.installation.systemd.write(&format!("{home}/{below_home}"), text)?;
        let owner = format!("{PERSON}:{PERSON}");
        self.installation.systemd.call(["chown", "-R", &owner, &home]).map(drop)
    }

    /// Starts a script that does not end. A drowse in it is ready when this returns.
    fn start(&mut self, script: &str) -> Result<()> {
        println!("# {} &", script.trim_end());
        let unit = format!("background-{}.service", self.background.len());
        let says_ready = script.contains("drowse run");
        let kind = format!("--service-type={}", if says_ready { "notify" } else { "exec" });
        let place = format!("--working-directory={CHECKOUT}");
        let name = format!("--unit={unit}");
        let words = ["systemd-run", "--quiet", "--property=NotifyAccess=all", &kind, &place, &name];
        let script = ["bash", "-euc", script];
        self.installation.systemd.call(words.into_iter().chain(script))?;
        self.background.push(unit);
        Ok(())
    }

    /// Ends what still runs, which must go well.
    fn finish(self) -> Result<()> {
        let systemd = &self.installation.systemd;
        for unit in &self.background {
            ensure!(systemd.property(unit, "ActiveState")? == "active", "{unit} has ended by itself");
            systemd.systemctl(["stop", unit])?;
            systemd.wait_until(unit, "ActiveState", SOON, |state| state != "deactivating")?;
            let state = systemd.property(unit, "ActiveState")?;
            ensure!(state == "inactive", "{unit} is {state} after its stop");
        }
        Ok(())
    }
}

/// Why a block is not run, checked as far as it can be.
fn is_excused(block: &Block, mark: &str) -> Result<()> {
    if mark == "run by: another test" {
        let commands =
            block.text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        for command in commands {
            let known = ELSEWHERE.iter().any(|(prefix, ..)| command.starts_with(prefix));
            ensure!(known, "no other test is known to run `{command}`");
        }
        return Ok(());
    }
    let program = mark.strip_prefix("run by: nobody, needs ").unwrap_or_default();
    ensure!(NOT_HERE.contains(&program), "the mark {mark:?} is none of those that are known");
    ensure!(block.text.contains(program), "{program} is not even used");
    Ok(())
}
