# What the machine must have for a lab, and where Debian comes from.

need_root() {
    # Whoever owns the root directory.
    [ -O / ] || fail "not root: run it as root, in a virtual machine or container if need be"
}

need_programs() {
    missing=
    for program in "$@"; do
        command -v "$program" >/dev/null || missing="$missing $program"
    done
    [ -n "$missing" ] || return 0
    packages="debootstrap debian-archive-keyring util-linux"
    case $missing in
        *chromium* | *pngquant*) packages="chromium fonts-dejavu-core pngquant" ;;
    esac
    command -v apt-get >/dev/null ||
        fail "missing programs:$missing: install $packages"
    say "installing what is missing:$missing"
    install_packages $packages >&2 ||
        fail "failed to install the missing programs:$missing"
}

install_packages() {
    retry apt-get update -qq &&
        retry env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
            --no-install-recommends "$@"
}

need_kernel() {
    unshare --mount --pid --uts --ipc --fork true 2>/dev/null ||
        fail "the kernel refuses new namespaces: run it on a machine, or in a privileged container"
    grep -qw overlay /proc/filesystems || modprobe overlay 2>/dev/null ||
        fail "the kernel has no overlay file system: load its module 'overlay'"
}

# Have promtool, of Debian's package prometheus: installed, that would serve.
make_promtool() {
    [ ! -x "$lab/roots/promtool" ] || return 0
    need_programs apt-get dpkg-deb
    mkdir -p "$lab/roots"
    place=$(mktemp -d "$lab/roots/promtool.XXXXXX")
    (
        cd "$place" || exit
        apt-get download -qq prometheus 2>/dev/null ||
            { retry apt-get update -qq && retry apt-get download -qq prometheus; } ||
            exit
        dpkg-deb --extract prometheus_*.deb . && mv usr/bin/promtool ..
    ) >&2 || fail "failed to fetch Debian's package prometheus: see 'apt-get update'"
    rm -rf "$place"
}

promtool() {
    make_promtool
    "$lab/roots/promtool" "$@"
}

# The Debian mirror that apt uses on this machine, from sources of both forms.
mirror() {
    if [ -n "${OFFLOAD_LAB_MIRROR:-}" ]; then
        echo "$OFFLOAD_LAB_MIRROR"
        return
    fi
    found=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list \
                /etc/apt/sources.list.d/*.sources 2>/dev/null |
                sed 's/#.*//' | tr -s ' \t' '\n\n' |
                grep -E '^[a-z]+://.*/debian/?$' | head -n 1)
    [ -n "$found" ] ||
        fail "no Debian mirror in apt's sources: name one in OFFLOAD_LAB_MIRROR"
    echo "$found"
}

# Run a command, which may need the network, up to four times.
retry() {
    for pause in 1 3 9; do
        "$@" && return
        sleep $pause
    done
    "$@"
}
