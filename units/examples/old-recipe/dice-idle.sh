#!/bin/sh
# Stops dice.service and its proxy when no connection is open at this moment. A connection that comes between the
# look and the stop is lost; one that stays open and silent keeps everything awake.
systemctl -q is-active dice.service || exit 0
if [ "$(ss -Htn state established 'sport = :8081' | wc -l)" -eq 0 ]; then
    systemctl stop dice-proxy.service dice.service
fi
