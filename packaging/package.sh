#!/bin/bash
# Build everything that is released into dist/: wheel, sdist, SBOM, and the Debian package.
#
# package.sh [RELEASE...]    Debian releases, by default bookworm and trixie
#
# The sources are those of the current commit, or of the folder SOURCE. OUT replaces dist/. Each
# Debian package is built in a clean root of its release, without a network, and checked by lintian,
# unless LINTIAN=no. The lab's cache keeps the roots (1 GB each). Equal sources give equal files.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" -eq 0 ] || { echo "$0: run it as root: it needs chroot(8)" >&2; exit 1; }

# Print the mirror of Debian's main section; security and updates are other suites.
mirror() {
    apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages' |
        awk '$1 !~ /-/ && $2 == "main" && $3 ~ /\/debian\/$/ && !n++ {print $3}'
}

[ "${1-}" != --mirror ] || { mirror; exit; }
declare -A number=([bookworm]=12 [trixie]=13)
releases=("$@")
[ $# -gt 0 ] || releases=(bookworm trixie)
out=$(mkdir -p "${OUT:-dist}" && realpath "${OUT:-dist}")
cache=${IPSECGATE_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ipsecgate}/package
tools=$cache/tools-$(sha256sum packaging/requirements.txt | cut -c1-12)
work=$(mktemp -d "${TMPDIR:-/tmp}/ipsecgate-package.XXXXXX")
trap 'rm -rf "$work"' EXIT
umask 022
export SOURCE_DATE_EPOCH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)

# step TEXT CMD...: run CMD with its output in $work/log; print the end of that if it fails.
step() {
    local text=$1 began=$SECONDS
    shift
    printf '%s ... ' "$text"
    "$@" >"$work/log" 2>&1 || { echo failed; tail -n 40 "$work/log" >&2; return 1; }
    echo "$((SECONDS - began)) s"
}

make_tools() {
    rm -rf "$tools"
    /usr/bin/python3 -m venv "$tools.part"
    "$tools.part/bin/python" -m pip install --quiet -r packaging/requirements.txt
    mv "$tools.part" "$tools"
}

export_source() {
    if [ -n "${SOURCE-}" ]; then
        cp -a "$SOURCE" "$work/source"
    else
        mkdir "$work/source"
        git archive HEAD | tar -x -C "$work/source"
    fi
}

build_python() {
    (cd "$work/source" && "$tools/bin/python" -m hatchling build -d "$out")
}

# The wheel with exactly the versions that the tests ran with. The SBOM lists them, with licenses.
make_sbom() {
    /usr/bin/python3 -m venv --without-pip "$work/installed"
    "$tools/bin/python" -m pip --python "$work/installed/bin/python" install --quiet -c constraints.txt \
        "$out/ipsecgate-$version-py3-none-any.whl"
    "$tools/bin/python" -m cyclonedx_py environment "$work/installed/bin/python" --output-reproducible \
        --pyproject "$work/source/pyproject.toml" --mc-type application --gather-license-texts \
        -o "$out/ipsecgate-$version.cdx.json"
}

# inside ROOT CMD...: run CMD in the root with the work folder as /build, in new namespaces.
# NETWORK=1 keeps the network.
inside() {
    local namespaces=(--mount --propagation private --pid --fork --kill-child=KILL) root=$1
    shift
    [ -n "${NETWORK-}" ] || namespaces+=(--net)
    unshare "${namespaces[@]}" /bin/sh -euc '
        root=$1 work=$2
        shift 2
        mkdir -p "$root/build"
        mount --bind "$work" "$root/build"
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        cp -L /etc/resolv.conf /etc/hosts "$root/etc"
        exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
            DEBIAN_FRONTEND=noninteractive "$@"' sh "$root" "$work" "$@"
}

# A clean root of a release, with lintian.
make_root() {
    local root=$1 release=$2
    rm -rf "$root.part"
    mmdebstrap --quiet --mode=root --variant=buildd --format=directory \
        --skip=cleanup/apt/lists --include=lintian "$release" "$root.part" "$(mirror)"
    mv "$root.part" "$root"
}

# The Debian source package: the sdist and PyPI's sdist of vici, both as released, and debian/.
make_debian_source() {
    local folder=$work/debian/ipsecgate-$version
    rm -rf "$work/debian"
    mkdir -p "$folder/vici"
    cp "$out/ipsecgate-$version.tar.gz" "$work/debian/ipsecgate_$version.orig.tar.gz"
    cp "$work/vici"/vici-*.tar.gz "$work/debian/ipsecgate_$version.orig-vici.tar.gz"
    tar -x -C "$folder" --strip-components=1 -f "$work/debian/ipsecgate_$version.orig.tar.gz"
    tar -x -C "$folder/vici" --strip-components=1 --no-same-owner \
        -f "$work/debian/ipsecgate_$version.orig-vici.tar.gz"
    cp -a "$work/source/packaging/debian" "$folder"
    # An upgrade of Debian is then also one of the package.
    sed -i "1s/(\(.*\)) [a-z]*;/(\1~deb${number[$1]}) $1;/" "$folder/debian/changelog"
}

install_dependencies() {
    inside "$1" sh -c 'cd /build/debian/ipsecgate-* && dpkg-checkbuilddeps' ||
        NETWORK=1 inside "$1" sh -euc '
            cd /build/debian/ipsecgate-*
            apt-get --quiet update
            apt-get --yes build-dep .'
}

build_debian() {
    inside "$1" sh -c 'cd /build/debian/ipsecgate-* && dpkg-buildpackage --no-sign'
}

check_debian() {
    inside "$1" sh -c 'cd /build/debian && lintian --info --tag-display-limit 0 \
        --fail-on error,warning --suppress-tags initial-upload-closes-no-bugs ./*.changes'
}

[ -x "$tools/bin/python" ] || step "installing the build tools" make_tools
command -v mmdebstrap >/dev/null || DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet \
    --no-install-recommends mmdebstrap
export_source
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$work/source/pyproject.toml")
step "building wheel and sdist" build_python
step "listing the parts in an SBOM (CycloneDX)" make_sbom
step "downloading vici's source" "$tools/bin/python" -m pip download --quiet --no-deps --no-binary :all: \
    --require-hashes -r packaging/vici.txt -d "$work/vici"
for release in "${releases[@]}"; do
    root=$cache/$release
    make_debian_source "$release"
    [ -d "$root" ] || step "making a clean root of $release" make_root "$root" "$release"
    step "installing what builds the package for $release" install_dependencies "$root"
    step "building the package for $release" build_debian "$root"
    [ "${LINTIAN-}" = no ] || step "checking it with lintian" check_debian "$root"
    rm -rf "${out:?}/$release"
    mkdir "$out/$release"
    # The other two files of the build say when it was made.
    find "$work/debian" -maxdepth 1 -type f ! -name '*.buildinfo' ! -name '*.changes' -exec cp {} "$out/$release" \;
done
(cd "$out" && find . -type f ! -name SHA256SUMS -printf '%P\n' | sort | xargs sha256sum >SHA256SUMS)
du -h --apparent-size "$out"/*.* "$out"/*/*.deb
