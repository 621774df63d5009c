//! Files and links that change together, or not at all.
//!
//! Owns: writing them so that nobody ever reads half a file, and putting back what was there. Must never: decide what is
//! in them.
//!
//! Rests on: `rename(2)` replaces a file at once; a file and its name are on the disk after `fsync(2)` of the file and
//! of its directory.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use similar::TextDiff;

use super::contents::Link;
use super::plan::Change;

/// What was changed so far, so that it can be undone.
#[derive(Debug, Default)]
pub struct Changed {
    files: Vec<Change>,
    links: Vec<PathBuf>,
    /// Directories that were made, outermost first.
    made: Vec<PathBuf>,
}

impl Changed {
    /// Makes one change.
    ///
    /// # Errors
    /// The file or its directory cannot be written; nothing has changed then.
    pub fn apply(&mut self, change: &Change) -> anyhow::Result<()> {
        match &change.after {
            Some(text) => {
                self.make_parents(&change.path)?;
                write(&change.path, text)
            }
            None => fs::remove_file(&change.path).map_err(Into::into),
        }
        .with_context(|| format!("write {}", change.path.display()))?;
        self.files.push(change.clone());
        Ok(())
    }

    /// Puts links back where they were, all that can be. Another file in the place of one stays.
    ///
    /// # Errors
    /// Those that cannot be made; the others are.
    pub fn restore(&mut self, links: &[Link]) -> anyhow::Result<()> {
        let mut failed = Vec::new();
        for Link { path, target } in links {
            let made = self.make_parents(path).and_then(|()| match symlink(target, path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
                made => Ok(made.map(|()| self.links.push(path.clone()))?),
            });
            if let Err(error) = made {
                failed.push(format!("link {} to {}: {error:#}", path.display(), target.display()));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(anyhow::Error::msg(failed.join("; "))) }
    }

    /// Puts everything back, the last change first. Says what could not be undone.
    #[must_use]
    pub fn undo(self) -> Vec<String> {
        let mut failed = Vec::new();
        for Change { path, before, .. } in self.files.iter().rev() {
            let undone = match before {
                Some(text) => write(path, text),
                None => fs::remove_file(path).map_err(Into::into),
            };
            if let Err(error) = undone {
                failed.push(format!("{} could not be put back: {error:#}", path.display()));
            }
        }
        for path in self.links.iter().rev() {
            if let Err(error) = fs::remove_file(path) {
                failed.push(format!("the link {} could not be removed: {error}", path.display()));
            }
        }
        for directory in self.made.iter().rev() {
            // Not empty: somebody else has put something there.
            let _stays = fs::remove_dir(directory);
        }
        failed
    }

    fn make_parents(&mut self, path: &Path) -> anyhow::Result<()> {
        let missing: Vec<_> = path.ancestors().skip(1).take_while(|directory| !directory.exists()).collect();
        for directory in missing.into_iter().rev() {
            match DirBuilder::new().mode(0o755).create(directory) {
                Ok(()) => {
                    // Whatever the umask is: drowse itself reads as another user.
                    fs::set_permissions(directory, Permissions::from_mode(0o755))?;
                    self.made.push(directory.to_owned());
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("make {}", directory.display()));
                }
            }
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let directory = path.parent().context("find the directory")?;
    // systemd reads no file of a name like this one's.
    let mut file = tempfile::Builder::new().prefix(".drowse-").tempfile_in(directory)?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(Permissions::from_mode(0o644))?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(directory)?.sync_all()?;
    Ok(())
}

/// Puts links back where they were, for good.
///
/// # Errors
/// As [`Changed::restore`].
pub fn restore(links: &[Link]) -> anyhow::Result<()> {
    Changed::default().restore(links)
}

/// The change as `diff -u` has it.
#[must_use]
pub fn diff(change: &Change) -> String {
    let name = |there: bool| if there { change.path.display().to_string() } else { "/dev/null".to_owned() };
    let (before, after) = (change.before.as_deref(), change.after.as_deref());
    TextDiff::from_lines(before.unwrap_or_default(), after.unwrap_or_default())
        .unified_diff()
        .header(&name(before.is_some()), &name(after.is_some()))
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(path: &Path, before: Option<&str>, after: Option<&str>) -> Change {
        Change { path: path.to_owned(), before: before.map(str::to_owned), after: after.map(str::to_owned) }
    }

    #[test]
    fn changes_are_undone_to_the_last_directory() {
        let root = tempfile::tempdir().unwrap();
        let (old, new) = (root.path().join("old"), root.path().join("a/b/new"));
        fs::write(&old, "before").unwrap();
        let gone = root.path().join("gone");
        fs::write(&gone, "still there").unwrap();
        let mut changed = Changed::default();
        changed.apply(&change(&old, Some("before"), Some("after"))).unwrap();
        changed.apply(&change(&new, None, Some("new"))).unwrap();
        changed.apply(&change(&gone, Some("still there"), None)).unwrap();
        assert_eq!(fs::read_to_string(&new).unwrap(), "new");
        assert_eq!(fs::metadata(&new).unwrap().permissions().mode() & 0o777, 0o644);
        assert!(!gone.exists());
        assert_eq!(changed.undo(), Vec::<String>::new());
        assert_eq!(fs::read_to_string(&old).unwrap(), "before");
        assert_eq!(fs::read_to_string(&gone).unwrap(), "still there");
        assert!(!root.path().join("a").exists());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2, "nothing is left behind");
    }

    #[test]
    fn a_change_that_cannot_be_made_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let mut changed = Changed::default();
        let error = changed.apply(&change(&file.join("x/y"), None, Some("text"))).unwrap_err();
        assert!(format!("{error:#}").contains("make "), "{error:#}");
        assert_eq!(changed.undo(), Vec::<String>::new());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn links_are_put_back_and_only_those_are_undone() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let link = |path: &str| Link { path: root.path().join(path), target: "../web.service".into() };
        let links = ["a.wants/web.service", "file/impossible", "b.wants/web.service", "c"].map(link);
        let [there, impossible, new, gone] = &links;
        restore(std::slice::from_ref(there)).unwrap();

        let mut changed = Changed::default();
        let error = changed.restore(&links).unwrap_err().to_string();
        assert!(error.contains("file/impossible") && !error.contains("wants"), "{error}");
        for link in [there, new, gone] {
            assert_eq!(fs::read_link(&link.path).unwrap(), link.target, "it goes on after {impossible:?}");
        }
        fs::remove_file(&gone.path).unwrap();
        let failed = changed.undo();
        assert!(failed.len() == 1 && failed[0].contains("/c could not be removed"), "{failed:?}");
        assert!(there.path.is_symlink(), "it was there before");
        assert!(!root.path().join("b.wants").exists(), "it goes on after an error");
    }

    #[test]
    fn a_diff_is_unified() {
        let text = diff(&change(Path::new("/etc/x"), None, Some("a\nb\n")));
        assert_eq!(text, "--- /dev/null\n+++ /etc/x\n@@ -0,0 +1,2 @@\n+a\n+b\n");
    }
}
