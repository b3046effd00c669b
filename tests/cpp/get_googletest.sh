#!/bin/sh
# Makes GoogleTest available to CMake: does nothing where it is installed, installs Debian's package as
# root, and unpacks that package into the given folder otherwise.
set -eu
folder=$1
if printf '#include <gtest/gtest.h>\n' | c++ -std=c++17 -fsyntax-only -x c++ - 2>/dev/null; then
  exit 0
fi
if [ -f "$folder/usr/include/gtest/gtest.h" ]; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "GoogleTest is not installed. Install its development package (Fedora: gtest-devel, macOS:" >&2
  echo "brew install googletest), then run this again." >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends libgtest-dev
  exit 0
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$folder"
if ! apt-get download libgtest-dev googletest; then
  echo "GoogleTest could not be downloaded. Install it: sudo apt-get install libgtest-dev" >&2
  exit 1
fi
for package in ./*.deb; do
  dpkg -x "$package" .
done
