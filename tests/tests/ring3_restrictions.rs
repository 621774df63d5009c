//! What a real systemd says of units that must not see the clients themselves.

use anyhow::{Context, Result, ensure};
use drowse::activation::Driver;
use drowse::activation::systemd::{Bus, SystemdDriver};
use drowse_tests::service::SOON;
use drowse_tests::systemd::Systemd;

/// A unit's name, its \[Service\] section, and why hand-off is not for it.
const SERVICES: [(&str, &str, Option<&str>); 7] = [
    ("plain.service", "", None),
    // Without a deny-list, an allow-list does nothing.
    ("allowed.service", "IPAddressAllow=10.0.0.0/8", None),
    (
        "denied.service",
        "IPAddressDeny=any\nIPAddressAllow=localhost",
        Some("IPAddressDeny= of denied.service would see the real clients' addresses"),
    ),
    (
        "sliced.service",
        "Slice=strict-inner.slice",
        Some("IPAddressDeny= of strict.slice would see the real clients' addresses"),
    ),
    (
        "local.service",
        "RestrictNetworkInterfaces=lo",
        Some(
            "RestrictNetworkInterfaces= of local.service would see the interfaces that clients come through",
        ),
    ),
    (
        "filtered.service",
        "IPIngressFilterPath=/sys/fs/bpf/filter",
        Some("IPIngressFilterPath= of filtered.service would see the real clients' packets"),
    ),
    (
        "shared.service",
        "",
        Some(
            "shared.socket holds the backend's listener, too: it would go on taking connections while the backend \
             sleeps",
        ),
    ),
];

fn install(systemd: &Systemd) -> Result<()> {
    for (name, settings, _) in SERVICES {
        let unit = format!("[Service]\nExecStart=sleep infinity\n{settings}\n");
        systemd.write(&format!("/etc/systemd/system/{name}"), &unit)?;
    }
    systemd.write("/etc/systemd/system/strict.slice", "[Slice]\nIPAddressDeny=192.0.2.0/24\n")?;
    systemd.write("/etc/systemd/system/shared.socket", "[Socket]\nListenStream=127.0.0.1:8081\n")?;
    systemd.systemctl(["daemon-reload"])?;
    systemd.systemctl(["start", "shared.socket"]).map(drop)
}

async fn obstacle(unit: &str, bus: &Bus) -> Result<Option<String>> {
    let asked = async {
        let driver = SystemdDriver::connect(unit, bus.clone()).await?;
        Ok::<_, anyhow::Error>(driver.handoff_obstacle().await)
    };
    tokio::time::timeout(SOON, asked).await.context("the driver hangs")?
}

#[tokio::test]
async fn systemd_says_which_units_must_not_see_the_clients() -> Result<()> {
    let systemd = Systemd::boot()?;
    install(&systemd)?;
    let bus = Bus::Address(format!("unix:path={}", systemd.path("/run/dbus/system_bus_socket").display()));
    for (unit, _, expected) in SERVICES {
        // A unit that is not running and not even loaded yet has its settings all the same.
        let found = obstacle(unit, &bus).await?;
        ensure!(found.as_deref() == expected, "{unit}: {found:?}");
    }
    systemd.systemctl(["start", "plain.service", "sliced.service"])?;
    ensure!(obstacle("plain.service", &bus).await?.is_none(), "a running unit");
    ensure!(obstacle("sliced.service", &bus).await?.is_some(), "a running unit");

    // Settings can change while a unit runs.
    systemd.systemctl(["set-property", "--runtime", "system.slice", "IPAddressDeny=any"])?;
    let found = obstacle("plain.service", &bus).await?;
    let expected = "IPAddressDeny= of system.slice would see the real clients' addresses";
    ensure!(found.as_deref() == Some(expected), "{found:?}");
    Ok(())
}
