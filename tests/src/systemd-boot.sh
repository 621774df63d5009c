# Runs as process 1 of fresh pid, mount, uts, ipc, net and cgroup namespaces: builds a root on tmpfs and becomes systemd.
# Given by the environment: NAME, TREE (the directory whose usr and etc are used, "" for the host's), STATE (a host
# directory with `console` and `notify`), BINDS (lines of "from<TAB>to"), KEEP (units that are not masked).
set -eu
root=/mnt
tab=$(printf '\t')

hostname "$NAME"
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs $root
cd $root
mkdir -p .usr/upper .usr/work usr etc/systemd/system etc/systemd/system.conf.d etc/systemd/journald.conf.d etc/tmpfiles.d
mkdir -p etc/systemd/system-generators etc/drowse var/lib var/log var/tmp var/cache var/spool
mkdir -p proc sys dev run tmp root home opt srv old
chmod 1777 var/tmp
chmod 700 root
ln -s /run var/run
for d in bin sbin lib lib64 lib32; do
    if [ -e "$TREE/usr/$d" ]; then ln -s usr/$d $d; fi
done

# The host's /usr stays as it is: what a test installs lands in the upper layer.
mount -t overlay -o lowerdir="$TREE/usr",upperdir=.usr/upper,workdir=.usr/work overlay usr

# Of the kernel's own files only the network's may be written: they belong to our network namespace.
mount -t proc -o nosuid,nodev,noexec proc proc
mkdir .proc
mount -t proc proc .proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount --bind .proc/sys/net proc/sys/net
umount -l .proc
rmdir .proc
mount -t sysfs -o nosuid,nodev,noexec sysfs sys
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
mount -t bpf -o nosuid,nodev,noexec,mode=700 bpf sys/fs/bpf
mount -o remount,bind,ro,nosuid,nodev,noexec sys

mount -t tmpfs -o mode=755,nosuid tmpfs dev
for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
    IFS=: read -r name major minor <<NODE
$node
NODE
    mknod -m 666 "dev/$name" c "$major" "$minor"
done
mkdir dev/pts dev/shm dev/mqueue
ln -s /proc/self/fd dev/fd
ln -s fd/0 dev/stdin
ln -s fd/1 dev/stdout
ln -s fd/2 dev/stderr
ln -s pts/ptmx dev/ptmx
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
mount -t mqueue -o nosuid,nodev,noexec mqueue dev/mqueue
: >dev/console
mount --bind "$STATE/console" dev/console
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs tmp
mkdir -p run/lock run/host
ln -s /run/lock var/lock
: >run/host/notify
mount --bind "$STATE/notify" run/host/notify

for f in passwd group shadow gshadow nsswitch.conf ld.so.cache ld.so.conf ld.so.conf.d pam.d security login.defs \
    alternatives localtime protocols services polkit-1; do
    if [ -e "$TREE/etc/$f" ]; then cp -a "$TREE/etc/$f" etc/; fi
done
printf '127.0.0.1 localhost %s\n::1 localhost\n' "$NAME" >etc/hosts
echo "$NAME" >etc/hostname
tr -d - </proc/sys/kernel/random/uuid >etc/machine-id
ln -s ../proc/self/mounts etc/mtab
cat >etc/systemd/system.conf.d/test.conf <<CONF
[Manager]
DefaultTimeoutStartSec=20s
DefaultTimeoutStopSec=15s
CONF
cat >etc/systemd/journald.conf.d/test.conf <<CONF
[Journal]
Storage=volatile
RuntimeMaxUse=64M
RateLimitIntervalSec=0
ReadKMsg=no
Audit=no
ForwardToConsole=no
ForwardToWall=no
CONF

# The stock targets pull in what a machine needs and a test does not. tmpfiles must not clear /tmp: binds may be there.
units=etc/systemd/system
cat >$units/test.target <<UNIT
[Unit]
Description=Everything that a test needs
Requires=basic.target dbus.socket dbus.service
After=basic.target dbus.socket dbus.service
AllowIsolate=yes
UNIT
keep=" systemd-journald.service systemd-journald.socket systemd-journald-dev-log.socket dbus.socket dbus.service \
dbus-broker.service systemd-sysusers.service systemd-tmpfiles-setup.service $KEEP "
mask() {
    case $keep in *" $1 "*) return ;; esac
    ln -sf /dev/null "$units/$1"
}
for wanted in usr/lib/systemd/system/*.target.wants/*; do
    case $wanted in *.target | *.slice | *'*') continue ;; esac
    mask "${wanted##*/}"
done
for unit in systemd-sysctl.service systemd-remount-fs.service tmp.mount; do mask $unit; done
for generator in usr/lib/systemd/system-generators/*; do
    ln -s /dev/null "etc/systemd/system-generators/${generator##*/}"
done
for f in tmp x11 home; do ln -s /dev/null etc/tmpfiles.d/$f.conf; done

echo "$BINDS" | while IFS=$tab read -r from to; do
    if [ -z "$from" ]; then continue; fi
    if [ -d "$from" ]; then mkdir -p "$root$to"; else mkdir -p "$root${to%/*}" && : >"$root$to"; fi
    mount --rbind "$from" "$root$to"
done

pivot_root . old
umount -l /old
rmdir /old
cd /
mount --make-rshared /
exec env -i container=drowse-test NOTIFY_SOCKET=/run/host/notify \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /usr/lib/systemd/systemd --system --unit=test.target --show-status=no </dev/null >>/dev/console 2>&1
