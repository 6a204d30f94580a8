#!/bin/sh
# Unpacks Debian's package of Prometheus (prometheus and promtool) into a folder, without root and without installing it:
#     deploy/prometheus/fetch.sh FOLDER
# Where there is no apt-get, or no such package, it says so and the tests that need it are skipped.
set -eu
folder=$1
[ -x "$folder/usr/bin/promtool" ] && exit 0

skip() {
    echo "$0: $1; tests with a real Prometheus are skipped" >&2
    exit 0
}
command -v apt-get >/dev/null && command -v dpkg >/dev/null || skip "no apt-get here"

mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial"
folder=$(cd "$folder" && pwd)
trap 'rm -rf "$folder/apt" "$folder"/prometheus_*.deb' EXIT
cd "$folder"
# The machine's own lists, or, where they are missing or too old to be of use, lists of our own.
if ! apt-get download -qq prometheus >/dev/null 2>&1; then
    own="-o Dir::State::lists=$folder/apt/lists -o Dir::Cache=$folder/apt/cache -o APT::Sandbox::User="
    # shellcheck disable=SC2086  # options, several
    { apt-get $own update -qq && apt-get $own download -qq prometheus; } >/dev/null 2>&1 || skip "apt-get cannot download prometheus"
fi
dpkg -x prometheus_*.deb "$folder"
"$folder/usr/bin/prometheus" --version 2>&1 | sed 1q
