//! The systemd driver against a systemd that fails on demand.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use drowse::activation::systemd::manager::Manager;
use drowse::activation::systemd::{Bus, SystemdDriver};
use drowse::activation::{BackendState, Change, Driver, DriverFuture, Failure};
use drowse_tests::fake_systemd::{Answer, DEADLINE, FakeSystemd, FakeUnit, PrivateBus};
use zbus::wire::Variant;

const DICE: &str = "dice.service";

struct Fixture {
    driver: SystemdDriver,
    systemd: FakeSystemd,
    bus: PrivateBus,
}

impl Fixture {
    /// Starts the unit, up to where systemd was called `calls` times.
    async fn begin_start(&mut self) -> Result<DriverFuture<Result<(), Failure>>> {
        let mut start = self.driver.start();
        tokio::select! {
            ended = &mut start => bail!("the start ended before its job: {ended:?}"),
            called = self.systemd.wait_for_calls("StartUnit", 1) => called?,
        }
        // Replies come in order: with this one, that to the start is here, too.
        tokio::select! {
            ended = &mut start => bail!("the start ended before its job: {ended:?}"),
            state = self.driver.state() => drop(state?),
        }
        Ok(start)
    }

    fn starts(&self) -> usize {
        self.systemd.calls().iter().filter(|call| call.starts_with("StartUnit")).count()
    }
}

async fn fixture(unit: FakeUnit) -> Result<Fixture> {
    fixture_with(unit, DEADLINE).await
}

async fn fixture_with(unit: FakeUnit, reply_timeout: Duration) -> Result<Fixture> {
    let bus = PrivateBus::start()?;
    let systemd = FakeSystemd::start(&bus, DICE, unit).await?;
    let driver = SystemdDriver::connect_with(DICE, Bus::Address(bus.address()), reply_timeout).await?;
    Ok(Fixture { driver, systemd, bus })
}

fn starting(answers: impl IntoIterator<Item = Answer>) -> FakeUnit {
    FakeUnit { starts: answers.into_iter().collect(), ..FakeUnit::default() }
}

/// The outcome, or an error when it takes too long.
async fn within<T>(future: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(DEADLINE, future).await.context("the driver hangs")
}

async fn start_failure(driver: &mut SystemdDriver) -> Result<Failure> {
    within(driver.start()).await?.err().context("the start succeeded")
}

#[tokio::test]
async fn a_start_ends_with_its_job() -> Result<()> {
    let mut f = fixture(FakeUnit::default()).await?;
    assert_eq!(f.driver.name(), DICE);
    assert_eq!(f.driver.state().await, Ok(BackendState::Down));
    assert_eq!(within(f.driver.start()).await?, Ok(()));
    assert_eq!(f.driver.state().await, Ok(BackendState::Up));
    assert_eq!(within(f.driver.changed()).await?, Change::Up);
    assert_eq!(f.systemd.calls(), ["Subscribe", "StartUnit dice.service replace"]);
    Ok(())
}

#[tokio::test]
async fn a_start_waits_until_its_job_ends() -> Result<()> {
    let mut f = fixture(starting([Answer::Runs])).await?;
    let mut start = f.begin_start().await?;
    // A state does not end it.
    f.systemd.set_active(DICE, "activating");
    f.systemd.set_active(DICE, "active");
    tokio::select! {
        biased;
        ended = &mut start => bail!("the start ended before its job: {ended:?}"),
        change = f.driver.changed() => assert_eq!(change, Change::Up),
    }
    f.systemd.end_job(DICE, "done", "active");
    assert_eq!(within(start).await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn a_job_that_ends_before_the_call_is_answered_is_not_missed() -> Result<()> {
    let mut f = fixture(FakeUnit {
        starts: [Answer::EndsEarly { result: "done", then: "active" }].into(),
        stops: [Answer::EndsEarly { result: "done", then: "inactive" }].into(),
        ..FakeUnit::default()
    })
    .await?;
    assert_eq!(within(f.driver.start()).await?, Ok(()));
    assert_eq!(within(f.driver.stop()).await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn a_failed_job_carries_the_units_own_result() -> Result<()> {
    let mut unit = starting([Answer::Ends { result: "failed", then: "failed" }]);
    (unit.result, unit.main_code, unit.main_status) = ("exit-code", 1, 3);
    let mut f = fixture(unit).await?;
    let failure = start_failure(&mut f.driver).await?;
    assert_eq!(failure.result, "exit-code");
    assert_eq!(
        failure.message,
        "dice.service failed: main process exited with status 3 (exit-code); see: journalctl -u dice.service"
    );
    // The state that the job left behind is told, too, with the same reason.
    assert_eq!(within(f.driver.changed()).await?, Change::Down(Some(failure)));
    // The next start is a new try.
    assert_eq!(within(f.driver.start()).await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn every_other_job_result_is_a_failure_of_its_own() -> Result<()> {
    let results = ["canceled", "timeout", "dependency", "skipped", "assert", "unsupported", "collected"];
    let mut f = fixture(starting(results.map(|result| Answer::Ends { result, then: "inactive" }))).await?;
    for result in results {
        let failure = start_failure(&mut f.driver).await?;
        assert_eq!(failure.result, result);
        assert!(failure.message.starts_with("cannot start dice.service: "), "{failure}");
    }
    Ok(())
}

#[tokio::test]
async fn a_unit_that_is_down_again_after_its_job_did_not_start() -> Result<()> {
    let done = |then| Answer::Ends { result: "done", then };
    let mut f = fixture(starting([done("inactive"), done("inactive"), done("failed")])).await?;
    assert_eq!(start_failure(&mut f.driver).await?.result, "ended");
    f.systemd.change_unit(DICE, |unit| unit.condition = false);
    assert_eq!(start_failure(&mut f.driver).await?.result, "condition");
    f.systemd.change_unit(DICE, |unit| {
        (unit.result, unit.main_code, unit.main_status) = ("signal", 2, 9);
    });
    let failure = start_failure(&mut f.driver).await?;
    assert_eq!(failure.result, "signal");
    assert!(failure.message.contains("killed by signal 9"), "{failure}");
    Ok(())
}

#[tokio::test]
async fn a_start_limit_is_reset_before_the_next_start_and_only_then() -> Result<()> {
    let mut unit = starting([Answer::Ends { result: "failed", then: "failed" }]);
    unit.result = "start-limit-hit";
    let mut f = fixture(unit).await?;
    assert_eq!(start_failure(&mut f.driver).await?.result, "start-limit-hit");
    f.systemd.change_unit(DICE, |unit| unit.result = "success");
    assert_eq!(within(f.driver.start()).await?, Ok(()));
    assert_eq!(within(f.driver.start()).await?, Ok(()));
    let start = "StartUnit dice.service replace";
    assert_eq!(f.systemd.calls(), ["Subscribe", start, "ResetFailedUnit dice.service", start, start]);
    Ok(())
}

#[tokio::test]
async fn a_stop_ends_when_the_unit_is_down() -> Result<()> {
    let stops = [Answer::Ends { result: "done", then: "deactivating" }].into();
    let mut f = fixture(FakeUnit { active: "active", stops, ..FakeUnit::default() }).await?;
    let mut stop = f.driver.stop();
    tokio::select! {
        biased;
        ended = &mut stop => bail!("the stop ended while the unit was deactivating: {ended:?}"),
        change = f.driver.changed() => assert_eq!(change, Change::GoingDown),
    }
    f.systemd.set_active(DICE, "inactive");
    assert_eq!(within(stop).await?, Ok(()));
    assert_eq!(within(f.driver.changed()).await?, Change::Down(None));
    Ok(())
}

#[tokio::test]
async fn a_stop_that_ends_in_failed_is_a_stop() -> Result<()> {
    let stops = [Answer::Ends { result: "done", then: "failed" }].into();
    let mut f =
        fixture(FakeUnit { active: "active", result: "timeout", stops, ..FakeUnit::default() }).await?;
    assert_eq!(within(f.driver.stop()).await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn a_stop_that_somebody_undid_is_a_failure() -> Result<()> {
    let stops = ["canceled", "failed", "done"].map(|result| Answer::Ends { result, then: "active" });
    let mut f = fixture(FakeUnit { active: "active", stops: stops.into(), ..FakeUnit::default() }).await?;
    for result in ["canceled", "failed", "canceled"] {
        let stopped = within(f.driver.stop()).await?;
        assert_eq!(stopped.map_err(|failure| failure.result), Err(result.to_owned()));
    }
    Ok(())
}

#[tokio::test]
async fn what_is_not_there_is_down() -> Result<()> {
    let gone = Answer::Error("org.freedesktop.systemd1.NoSuchUnit", "Unit dice.service not loaded.");
    let mut f = fixture(FakeUnit { stops: [gone].into(), ..FakeUnit::default() }).await?;
    assert_eq!(within(f.driver.stop()).await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn units_that_cannot_be_started_say_why() -> Result<()> {
    let mut f = fixture(FakeUnit::default()).await?;
    for (load_state, says) in [
        ("not-found", "unit dice.service does not exist"),
        ("masked", "systemctl unmask dice.service"),
        ("bad-setting", "cannot be loaded (bad-setting): Bad setting"),
        ("error", "cannot be loaded (error): Bad setting"),
    ] {
        f.systemd.change_unit(DICE, |unit| (unit.load_state, unit.load_error) = (load_state, "Bad setting."));
        let failure = f.driver.state().await.err().context("the state is fine")?;
        assert_eq!(failure.result, load_state);
        assert!(failure.message.contains(says), "{failure}");
    }
    Ok(())
}

#[tokio::test]
async fn refusals_name_the_cause() -> Result<()> {
    let refusals = [
        ("org.freedesktop.DBus.Error.AccessDenied", "denied", "org.freedesktop.systemd1.manage-units"),
        ("org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", "denied", "run as root"),
        ("org.freedesktop.systemd1.UnitMasked", "masked", "unmask"),
        ("org.freedesktop.systemd1.NoSuchUnit", "not-found", "does not exist"),
        ("org.freedesktop.systemd1.BadUnitSetting", "bad-setting", "the cause"),
        (
            "org.freedesktop.systemd1.OnlyByDependency",
            "OnlyByDependency",
            "refused to start dice.service: the cause",
        ),
    ];
    let mut f = fixture(starting(refusals.map(|(name, ..)| Answer::Error(name, "the cause")))).await?;
    for (_, result, says) in refusals {
        let failure = start_failure(&mut f.driver).await?;
        assert_eq!(failure.result, result);
        assert!(failure.message.contains(says), "{failure}");
    }
    f.systemd.change_unit(DICE, |unit| {
        unit.stops.push_back(Answer::Error("org.freedesktop.DBus.Error.AccessDenied", "no"));
    });
    let failure = within(f.driver.stop()).await?.err().context("the stop succeeded")?;
    assert!(failure.message.starts_with("not allowed to stop dice.service"), "{failure}");
    Ok(())
}

#[tokio::test]
async fn a_reply_that_never_comes_is_a_failure() -> Result<()> {
    let mut f = fixture_with(starting([Answer::Silence]), Duration::from_millis(500)).await?;
    let failure = start_failure(&mut f.driver).await?;
    assert_eq!(failure.result, "bus");
    assert!(failure.message.contains("did not answer within 500ms"), "{failure}");
    // The connection is still good.
    assert_eq!(within(f.driver.start()).await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn no_bus_and_no_systemd_are_told() -> Result<()> {
    let nowhere = Bus::Address("unix:path=/nonexistent/bus".to_owned());
    let failure = SystemdDriver::connect(DICE, nowhere).await.err().context("connected to nothing")?;
    assert_eq!(failure.result, "bus");
    assert!(failure.message.contains("is dbus running?"), "{failure}");
    let bus = PrivateBus::start()?;
    let failure =
        SystemdDriver::connect(DICE, Bus::Address(bus.address())).await.err().context("no systemd")?;
    assert_eq!(failure.result, "bus");
    Ok(())
}

#[tokio::test]
async fn what_others_do_is_told_once() -> Result<()> {
    let mut f = fixture(FakeUnit::default()).await?;
    // systemd repeats a state whenever any property changes.
    for state in
        ["inactive", "activating", "active", "active", "reloading", "active", "deactivating", "inactive"]
    {
        f.systemd.set_active(DICE, state);
    }
    for change in [Change::Up, Change::GoingDown, Change::Down(None)] {
        assert_eq!(within(f.driver.changed()).await?, change);
    }
    // systemd's own restart of a unit that failed: not down, but up again when it is.
    for state in ["active", "activating", "active", "inactive"] {
        f.systemd.set_active(DICE, state);
    }
    for change in [Change::Up, Change::Up, Change::Down(None)] {
        assert_eq!(within(f.driver.changed()).await?, change);
    }
    Ok(())
}

#[tokio::test]
async fn a_crash_is_told_with_its_reason_even_to_a_reader_who_looks_away() -> Result<()> {
    let unit =
        FakeUnit { active: "active", result: "signal", main_code: 2, main_status: 11, ..FakeUnit::default() };
    let mut f = fixture(unit).await?;
    f.systemd.set_active(DICE, "failed");
    let mut polls = 0_u32;
    // Drops the future whenever something else is ready, as a select loop does.
    let change = within(async {
        loop {
            polls += 1;
            tokio::select! {
                biased;
                change = f.driver.changed() => break change,
                () = tokio::task::yield_now() => {}
            }
        }
    })
    .await?;
    ensure!(polls > 1, "the future was never dropped");
    let Change::Down(Some(failure)) = change else { bail!("not a failure: {change:?}") };
    assert_eq!(failure.result, "signal");
    assert!(failure.message.contains("killed by signal 11"), "{failure}");
    Ok(())
}

#[tokio::test]
async fn a_notify_unit_is_ready_when_it_is_active() -> Result<()> {
    for kind in ["notify", "notify-reload"] {
        let mut f = fixture(FakeUnit { kind, ..FakeUnit::default() }).await?;
        f.systemd.set_active(DICE, "active");
        assert_eq!(within(f.driver.changed()).await?, Change::Ready);
    }
    Ok(())
}

#[tokio::test]
async fn a_reload_may_change_the_units_type() -> Result<()> {
    let mut f = fixture(FakeUnit::default()).await?;
    f.systemd.change_unit(DICE, |unit| (unit.kind, unit.active) = ("notify", "active"));
    f.systemd.reloaded();
    assert_eq!(within(f.driver.changed()).await?, Change::Ready);
    Ok(())
}

#[tokio::test]
async fn an_alias_is_followed_to_the_unit() -> Result<()> {
    let mut f = fixture(FakeUnit { id: Some("real-dice.service"), ..FakeUnit::default() }).await?;
    assert_eq!(within(f.driver.start()).await?, Ok(()));
    assert_eq!(within(f.driver.changed()).await?, Change::Up);
    f.systemd.set_active(DICE, "inactive");
    assert_eq!(within(f.driver.changed()).await?, Change::Down(None));
    Ok(())
}

#[tokio::test]
async fn the_bus_dies_in_mid_start_and_comes_back() -> Result<()> {
    let mut f = fixture(starting([Answer::Runs])).await?;
    let start = f.begin_start().await?;
    f.bus.kill();
    f.systemd.wait_on_bus(false).await?;
    // The job ends while nobody hears of it.
    f.systemd.end_job_unheard(DICE, "active");
    f.bus.revive()?;
    assert_eq!(within(start).await?, Ok(()));
    assert_eq!(within(f.driver.changed()).await?, Change::Up);
    assert_eq!(f.starts(), 1);
    Ok(())
}

#[tokio::test]
async fn a_job_that_outlives_the_bus_is_still_followed() -> Result<()> {
    let mut f = fixture(starting([Answer::Runs])).await?;
    let mut start = f.begin_start().await?;
    f.bus.kill();
    f.systemd.wait_on_bus(false).await?;
    f.bus.revive()?;
    tokio::select! {
        ended = &mut start => bail!("the start ended before its job: {ended:?}"),
        called = f.systemd.wait_for_calls("Subscribe", 2) => called?,
    }
    f.systemd.end_job(DICE, "dependency", "inactive");
    let failure = within(start).await?.err().context("the start succeeded")?;
    // The end is heard, or found when the driver looks whether the job is still there.
    ensure!(matches!(failure.result.as_str(), "dependency" | "ended"), "{failure}");
    Ok(())
}

#[tokio::test]
async fn a_bus_that_stays_dead_fails_the_start_and_the_next_start_finds_the_new_bus() -> Result<()> {
    let mut f = fixture_with(starting([Answer::Runs]), Duration::from_millis(500)).await?;
    let start = f.begin_start().await?;
    f.bus.kill();
    let failure = within(start).await?.err().context("the start succeeded")?;
    assert_eq!(failure.result, "bus");
    assert_eq!(start_failure(&mut f.driver).await?.result, "bus");
    f.bus.revive()?;
    f.systemd.wait_on_bus(true).await?;
    assert_eq!(within(f.driver.start()).await?, Ok(()));
    assert_eq!(within(f.driver.changed()).await?, Change::Up);
    Ok(())
}

#[tokio::test]
async fn changes_that_the_dead_bus_hid_are_told_when_it_is_back() -> Result<()> {
    let mut f = fixture(FakeUnit { active: "active", ..FakeUnit::default() }).await?;
    f.bus.kill();
    f.systemd.wait_on_bus(false).await?;
    f.systemd.change_unit(DICE, |unit| unit.active = "inactive");
    f.bus.revive()?;
    // Nobody calls `start`: the driver connects by itself.
    assert_eq!(within(f.driver.changed()).await?, Change::Down(None));
    Ok(())
}

#[tokio::test]
async fn systemd_leaves_the_bus_for_a_moment_as_in_daemon_reexec() -> Result<()> {
    let mut f = fixture(starting([Answer::Runs])).await?;
    let start = f.begin_start().await?;
    f.systemd.leave_bus().await?;
    f.systemd.end_job_unheard(DICE, "active");
    f.systemd.come_back().await?;
    assert_eq!(within(start).await?, Ok(()));
    assert_eq!(within(f.driver.changed()).await?, Change::Up);
    f.systemd.set_active(DICE, "inactive");
    assert_eq!(within(f.driver.changed()).await?, Change::Down(None));
    Ok(())
}

#[tokio::test]
async fn a_start_while_systemd_is_away_waits_for_it() -> Result<()> {
    let mut f = fixture(FakeUnit::default()).await?;
    f.systemd.leave_bus().await?;
    let mut start = f.driver.start();
    // As far as it gets without systemd.
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut start).await.is_err());
    f.systemd.come_back().await?;
    assert_eq!(within(start).await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn a_signal_of_a_stranger_is_not_believed() -> Result<()> {
    let mut f = fixture(starting([Answer::Runs])).await?;
    let start = f.begin_start().await?;
    f.systemd.forge_job_removed("failed").await?;
    f.systemd.end_job(DICE, "done", "active");
    assert_eq!(within(start).await?, Ok(()));
    Ok(())
}

#[tokio::test]
async fn a_socket_unit_that_starts_the_backend_is_seen() -> Result<()> {
    let f =
        fixture(FakeUnit { triggered_by: vec!["dice.timer", "dice.socket"], ..FakeUnit::default() }).await?;
    for (timer, socket, expected) in [("active", "inactive", false), ("inactive", "active", true)] {
        f.systemd.set_unit("dice.timer", FakeUnit { active: timer, ..FakeUnit::default() });
        f.systemd.set_unit("dice.socket", FakeUnit { active: socket, ..FakeUnit::default() });
        assert_eq!(within(f.driver.is_socket_activated()).await?, expected);
    }
    Ok(())
}

fn slice(settings: Vec<(&'static str, Variant<'static>)>) -> FakeUnit {
    FakeUnit { active: "active", settings, ..FakeUnit::default() }
}

/// As systemd says `any`.
fn any() -> Variant<'static> {
    vec![(2_i32, vec![0_u8; 4], 0_u32), (10, vec![0; 16], 0)].into()
}

#[tokio::test]
async fn an_ordinary_unit_may_see_the_clients_itself() -> Result<()> {
    // An allow-list alone denies nothing.
    let f = fixture(FakeUnit { settings: vec![("IPAddressAllow", any())], ..FakeUnit::default() }).await?;
    assert_eq!(within(f.driver.handoff_obstacle()).await?, None);
    Ok(())
}

#[tokio::test]
async fn what_a_unit_restricts_is_an_obstacle() -> Result<()> {
    let f = fixture(FakeUnit::default()).await?;
    let names = || Variant::from(vec!["/sys/fs/bpf/x"]);
    for (setting, value, sees) in [
        ("IPAddressDeny", any(), "the real clients' addresses"),
        ("RestrictNetworkInterfaces", (true, vec!["lo"]).into(), "the interfaces that clients come through"),
        ("RestrictNetworkInterfaces", (false, vec!["lo"]).into(), "the interfaces that clients come through"),
        ("IPIngressFilterPath", names(), "the real clients' packets"),
        ("IPEgressFilterPath", names(), "the real clients' packets"),
        ("BPFProgram", vec![("ingress", "/sys/fs/bpf/x")].into(), "the real clients' packets"),
        ("NFTSet", vec![(0_i32, 1_i32, "filter", "dice")].into(), "the real clients' packets"),
    ] {
        f.systemd.change_unit(DICE, |unit| unit.settings = vec![(setting, value)]);
        let expected = format!("{setting}= of dice.service would see {sees}");
        assert_eq!(within(f.driver.handoff_obstacle()).await?, Some(expected));
    }
    Ok(())
}

#[tokio::test]
async fn what_the_slices_of_a_unit_restrict_is_an_obstacle() -> Result<()> {
    let f = fixture(FakeUnit { slice: "games-dice.slice", ..FakeUnit::default() }).await?;
    f.systemd.set_unit("games.slice", slice(vec![]));
    f.systemd.set_unit("games-dice.slice", slice(vec![]));
    assert_eq!(within(f.driver.handoff_obstacle()).await?, None);
    for name in ["games-dice.slice", "games.slice", "-.slice"] {
        f.systemd.set_unit(name, slice(vec![("IPAddressDeny", any())]));
        let expected = format!("IPAddressDeny= of {name} would see the real clients' addresses");
        assert_eq!(within(f.driver.handoff_obstacle()).await?, Some(expected));
        f.systemd.set_unit(name, slice(vec![]));
    }
    Ok(())
}

#[tokio::test]
async fn a_socket_unit_that_holds_the_listener_is_an_obstacle() -> Result<()> {
    let f = fixture(FakeUnit {
        triggered_by: vec!["dice.timer", "dice-admin.socket", "dice.socket"],
        ..FakeUnit::default()
    })
    .await?;
    for (name, active) in
        [("dice.timer", "active"), ("dice-admin.socket", "inactive"), ("dice.socket", "active")]
    {
        f.systemd.set_unit(name, FakeUnit { active, ..FakeUnit::default() });
    }
    let obstacle = within(f.driver.handoff_obstacle()).await?.context("no obstacle")?;
    assert_eq!(
        obstacle,
        "dice.socket holds the backend's listener, too: it would go on taking connections while the backend sleeps"
    );
    f.systemd.change_unit("dice.socket", |unit| unit.active = "inactive");
    assert_eq!(within(f.driver.handoff_obstacle()).await?, None);
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_known_is_an_obstacle() -> Result<()> {
    let mut f = fixture_with(FakeUnit::default(), Duration::from_millis(500)).await?;
    // A slice that systemd does not know.
    f.systemd.change_unit(DICE, |unit| unit.slice = "nowhere.slice");
    let obstacle = within(f.driver.handoff_obstacle()).await?.context("no obstacle")?;
    assert!(obstacle.starts_with("systemd could not be asked: "), "{obstacle}");
    f.systemd.change_unit(DICE, |unit| unit.slice = "system.slice");
    assert_eq!(within(f.driver.handoff_obstacle()).await?, None);
    f.bus.kill();
    let obstacle = within(f.driver.handoff_obstacle()).await?.context("no obstacle")?;
    assert!(obstacle.starts_with("systemd could not be asked: "), "{obstacle}");
    assert!(!obstacle.contains('\n'), "{obstacle}");

    let bus = PrivateBus::start()?;
    let name = "dice.target";
    let _systemd = FakeSystemd::start(&bus, name, FakeUnit::default()).await?;
    let driver = SystemdDriver::connect_with(name, Bus::Address(bus.address()), DEADLINE).await?;
    assert_eq!(
        within(driver.handoff_obstacle()).await?.as_deref(),
        Some("dice.target groups several units: what they restrict is unknown")
    );
    Ok(())
}

/// Generators may take longer than any other call.
#[tokio::test]
async fn a_reload_may_take_longer_than_another_answer() -> Result<()> {
    let bus = PrivateBus::start()?;
    let systemd = FakeSystemd::start(&bus, "dice.service", FakeUnit::default()).await?;
    let manager = Manager::connect(Bus::Address(bus.address()), Duration::from_secs(1)).await?;
    systemd.set_reload_time(Duration::from_millis(1500));
    manager.reload().await?;
    Ok(())
}
