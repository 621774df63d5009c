//! Settings of a unit that look at the peers of its connections. Behind drowse its only peer is drowse, over the
//! loopback interface; with the clients themselves as its peers, such a setting begins to mean something else.
//!
//! Owns: which settings these are, in which units they may be, and the line for people. Must never: do I/O.
//!
//! Rests on systemd: programs that are attached to the cgroup of a slice see the packets of all units below it, and
//! the address lists of all slices are merged into those of the unit (`bpf-firewall.c`, `restrict-ifaces.c`).

use std::collections::HashMap;
use std::iter::successors;

use zbus::wire::{OwnedVariant, Variant};

/// Properties of `org.freedesktop.systemd1.Service` and `.Slice`, and what they would see of the clients. A property
/// that this systemd does not know restricts nothing.
///
/// `IPAddressAllow` is not among them: what no list has is granted, so it does nothing without an `IPAddressDeny`
/// (systemd.resource-control(5)), and where there is one, it tells.
const SETTINGS: [(&str, &str); 6] = [
    ("IPAddressDeny", "the real clients' addresses"),
    ("RestrictNetworkInterfaces", "the interfaces that clients come through"),
    ("IPIngressFilterPath", "the real clients' packets"),
    ("IPEgressFilterPath", "the real clients' packets"),
    ("BPFProgram", "the real clients' packets"),
    ("NFTSet", "the real clients' packets"),
];

/// The first setting of the backend's `unit` that would apply to the clients, as a line for people.
pub(super) fn find(unit: &str, properties: &HashMap<String, OwnedVariant>) -> Option<String> {
    let (setting, what) = first(properties)?;
    Some(format!("{setting}= of {unit} would see {what}"))
}

/// The first setting of one of drowse's own units that applies to the clients now and would not any more: such a program
/// sees the packets of the sockets of its unit, and with a hand-off the clients' are the backend's.
pub(super) fn find_own(unit: &str, properties: &HashMap<String, OwnedVariant>) -> Option<String> {
    let (setting, _) = first(properties)?;
    Some(format!("{setting}= of {unit} would not apply to the clients any more"))
}

fn first(properties: &HashMap<String, OwnedVariant>) -> Option<(&'static str, &'static str)> {
    SETTINGS.into_iter().find(|(setting, _)| properties.get(*setting).is_some_and(|value| is_set(value)))
}

/// Whether a list, or one of the lists that go with a flag, has an entry.
fn is_set(value: &Variant<'_>) -> bool {
    if let Variant::Structure(fields) = value {
        return fields.fields().iter().any(is_set);
    }
    matches!(value, Variant::Array(entries) if !entries.is_empty())
}

/// A slice and those around it, as their names say: `a-b.slice` is in `a.slice`, which is in `-.slice`
/// (systemd.slice(5)). None for the empty name, which a unit has that is not loaded.
pub(super) fn slices(innermost: &str) -> Vec<String> {
    const ROOT: &str = "-.slice";
    let parent = |slice: &String| {
        let stem = slice.strip_suffix(".slice").filter(|stem| *stem != "-")?;
        Some(stem.rsplit_once('-').map_or_else(|| ROOT.to_owned(), |(parent, _)| format!("{parent}.slice")))
    };
    let innermost = Some(innermost.to_owned()).filter(|name| !name.is_empty());
    successors(innermost, parent).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_nested_by_their_names() {
        assert_eq!(slices("a-b-c.slice"), ["a-b-c.slice", "a-b.slice", "a.slice", "-.slice"]);
        assert_eq!(
            slices(r"system-drowse\x2dx.slice"),
            [r"system-drowse\x2dx.slice", "system.slice", "-.slice"]
        );
        assert_eq!(slices("-.slice"), ["-.slice"]);
        assert!(slices("").is_empty());
        // No slice of systemd's has such a name; it must end all the same.
        assert_eq!(slices("-a.slice"), ["-a.slice", ".slice", "-.slice"]);
        assert_eq!(slices("a.service"), ["a.service"]);
    }

    #[test]
    fn only_what_is_set_counts() {
        let found = |setting: &str, value: Variant<'_>| {
            let properties = HashMap::from([(setting.to_owned(), OwnedVariant::try_from(value).unwrap())]);
            find("dice.service", &properties)
        };
        let says = |text: &str| Some(text.to_owned());
        let none = || Vec::<(i32, Vec<u8>, u32)>::new();
        let any = || vec![(libc::AF_INET, vec![0_u8; 4], 0_u32)];
        assert_eq!(find("dice.service", &HashMap::new()), None);
        assert_eq!(found("IPAddressDeny", none().into()), None);
        assert_eq!(
            found("IPAddressDeny", any().into()),
            says("IPAddressDeny= of dice.service would see the real clients' addresses")
        );
        assert_eq!(found("IPAddressAllow", any().into()), None);
        for is_allow_list in [false, true] {
            // systemd keeps the flag of a list that was emptied.
            let unset = (is_allow_list, Vec::<&str>::new()).into();
            assert_eq!(found("RestrictNetworkInterfaces", unset), None);
            assert_eq!(
                found("RestrictNetworkInterfaces", (is_allow_list, vec!["lo"]).into()),
                says(
                    "RestrictNetworkInterfaces= of dice.service would see the interfaces that clients come through"
                )
            );
        }
        assert_eq!(
            found("IPIngressFilterPath", vec!["/sys/fs/bpf/x"].into()),
            says("IPIngressFilterPath= of dice.service would see the real clients' packets")
        );
        assert!(found("BPFProgram", vec![("ingress", "/sys/fs/bpf/x")].into()).is_some());
    }
}
