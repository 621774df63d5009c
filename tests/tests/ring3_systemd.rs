//! The fixture itself: what the other tests of this ring take for granted.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use anyhow::{Result, ensure};
use drowse_tests::systemd::Systemd;

#[test]
fn systemd_boots_and_leaves_nothing_behind() -> Result<()> {
    let systemd = Systemd::boot()?;
    println!("booted in {:?}", systemd.boot_time());
    ensure!(systemd.systemctl(["is-system-running"])?.trim() == "running");
    let init = systemd.path("");
    ensure!(init.join("etc/machine-id").exists());

    let outside = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = outside.local_addr()?.port();
    // The same port is free inside: the network is another one.
    systemd.in_netns(|| TcpListener::bind((Ipv4Addr::LOCALHOST, port)))??;

    systemd.write("/etc/systemd/system/hello.service", "[Service]\nType=oneshot\nExecStart=echo hello\n")?;
    systemd.systemctl(["start", "hello.service"])?;
    systemd.wait_until_property("hello.service", "Result", "success", Duration::from_secs(5))?;
    ensure!(systemd.lines_of("hello.service")? == ["hello"]);
    ensure!(systemd.journal("hello.service")?.lines().count() > 1, "systemd's own lines are there, too");

    drop(systemd);
    ensure!(!init.exists(), "process 1 is gone");
    let name = format!("drowse-test-{}-", std::process::id());
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let root = mounts.lines().find(|line| line.contains(" cgroup2 ")).and_then(|line| line.split(' ').nth(1));
    for entry in fs::read_dir(root.unwrap_or("/sys/fs/cgroup"))? {
        ensure!(!entry?.file_name().to_string_lossy().starts_with(&name), "the cgroup is gone");
    }
    Ok(())
}

#[test]
fn a_failing_command_is_told_with_what_it_said() -> Result<()> {
    let systemd = Systemd::boot()?;
    let Err(error) = systemd.systemctl(["start", "nothing.service"]) else {
        anyhow::bail!("starting a unit that is not there must fail");
    };
    ensure!(error.to_string().contains("nothing.service not found"), "{error}");
    Ok(())
}
