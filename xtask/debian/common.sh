#!/bin/sh
set -e

# `systemctl ARGUMENTS` for the system's manager and for those of users who are logged in, as far as any runs. A failure
# is told, but an administrator must be able to install and remove the package all the same.
systemctl_everywhere() {
    if [ ! -d /run/systemd/system ]; then return 0; fi
    systemctl "$@" || echo "drowse: systemctl $* failed" >&2
    systemctl list-units --plain --no-legend 'user@*.service' | while read -r unit _; do
        user=${unit#user@}
        user=${user%.service}
        # Not --machine=: that needs the user's D-Bus and logind.
        setpriv --reuid "$user" --regid "$(id -g "$user")" --init-groups \
            env XDG_RUNTIME_DIR="/run/user/$user" systemctl --user "$@" </dev/null ||
            echo "drowse: systemctl --user $* failed for user $user" >&2
    done
}

