#!/bin/bash
# Build what is released twice, and compare; then prove the wheel and the Debian packages in clean
# places. Only what is committed is built.
#
# run.sh [RELEASE...]    Debian releases, by default bookworm and trixie
#
# ARGS: more arguments for pytest. Everything is in .cache/package and in the lab's cache.
set -euo pipefail
cd "$(dirname "$0")/../.."
releases=("$@")
[ $# -gt 0 ] || releases=(bookworm trixie)
place=$PWD/.cache/package
roots=${IPSECGATE_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ipsecgate}/package
python=.venv/bin/python
[ -z "$(git status --porcelain)" ] || { echo "not committed, so not tested:"; git status --short; }
rm -rf "$place"
mkdir -p "$place"

OUT=$place/dist packaging/package.sh "${releases[@]}"
(umask 077; LINTIAN=no TZ=Asia/Tokyo OUT=$place/again packaging/package.sh "${releases[@]}" >"$place/again.log")
diff -r "$place/dist" "$place/again"
echo "built twice, $(find "$place/dist" -type f | wc -l) files, all equal"

# The same with a higher version and another layout of the maps, to upgrade to.
mkdir "$place/source"
git archive HEAD | tar -x -C "$place/source"
(
    cd "$place/source"
    sed -i 's/^version = .*/version = "0.999"/' pyproject.toml
    sed -i '1s/(.*)/(0.999-1)/' packaging/debian/changelog
    layout=$(sed -n 's/^#define GATE_LAYOUT \([0-9]*\).*/\1/p' bpf/gate.h)
    sed -i "s/^#define GATE_LAYOUT .*/#define GATE_LAYOUT $((layout + 1))/" bpf/gate.h
    sed -i "s/^LAYOUT = .*/LAYOUT = $((layout + 1))/" ipsecgate/core/tables/layout.py
    grep -q "^LAYOUT = $((layout + 1))$" ipsecgate/core/tables/layout.py
)
LINTIAN=no SOURCE=$place/source OUT=$place/next packaging/package.sh "${releases[@]}" >"$place/next.log"

for release in "${releases[@]}"; do
    depends=$(dpkg-deb --field "$place/dist/$release"/*.deb Depends)
    root=$roots/clean-$release-$(sha256sum <<<"$depends" | cut -c1-8)
    if [ ! -d "$root" ]; then
        echo "making a clean root of $release, without BCC"
        rm -rf "$roots/clean-$release"-*
        mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
            --aptopt='APT::Install-Recommends "false"' \
            --include="systemd,python3-venv,charon-systemd,$(sed 's/ *([^)]*)//g; s/:any//g; s/ //g' <<<"$depends")" \
            "$release" "$root.part" "$(packaging/package.sh --mirror)"
        mv "$root.part" "$root"
    fi
    echo "$release: $(chroot "$root" dpkg-query -W systemd python3 python3-click python3-rich libbpf1 | tr '\t\n' ' ,')"
    export IPSECGATE_PACKAGE_ROOT=$root IPSECGATE_PACKAGE_DIST=$place/dist
    .venv/bin/pytest -q tests/package/test_wheel.py ${ARGS-}
    IPSECGATE_PACKAGE_FILE=$(echo "$place/dist/$release"/*.deb) \
        IPSECGATE_PACKAGE_NEXT=$(echo "$place/next/$release"/*.deb) \
        $python -m ipsecgate.lab.guest --timeout "${LIMIT:-900}" --results .cache/results -- \
        .venv/bin/pytest -q tests/package/test_debian.py --durations=10 \
        --junitxml=".cache/results/package-$release.xml" ${ARGS-}
done
