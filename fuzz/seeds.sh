#!/bin/bash
# Archives to begin with, for layer_tar and layer_unpack: seeds.sh DIRECTORY (root)
set -euo pipefail
out=$(realpath -m "$1")
mkdir -p "$out"
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
cd "$tree"
mkdir -p a/b c d/e
echo one > a/one
echo two > a/b/two
chmod 4755 a/one
ln a/one c/same
ln -s ../a c/link
ln -s /a c/absolute
mkfifo c/fifo
mknod c/null c 1 3
touch d/.wh.gone d/e/.wh..wh..opq
truncate -s 20K a/sparse
printf x | dd of=a/sparse bs=1 seek=12K conv=notrunc status=none
long=$(printf 'n%.0s' {1..130})
echo long > "a/$long"
ln -s "$long$long" a/long
printf bytes > $'a/\xff\xfe'
if command -v setfattr > /dev/null; then setfattr -n user.note -v text a/one; fi
number=0
for options in --format=posix --format=gnu --format=oldgnu "--format=gnu --sparse" \
    "--format=posix --sparse --sparse-version=0.0" "--format=posix --sparse --sparse-version=0.1" \
    "--format=posix --sparse --sparse-version=1.0" "--format=posix --xattrs"; do
  tar --sort=name $options -cf "$out/all-$((number += 1))" .
  # Small ones are changed sooner.
  for part in a/one a/sparse "a/$long" a/long c d; do
    tar --sort=name $options -cf "$out/part-$((number += 1))" "$part"
  done
done
tar --format=ustar -cf "$out/ustar" a/one a/b c
tar --format=v7 -cf "$out/v7" a/b c/link c/same a/one
# The same names once more, as other things.
rm -r a c && mkdir c && ln -s c a && mkdir c/fifo && echo other > c/link
cp "$out/all-1" "$out/twice" && tar --format=posix -rf "$out/twice" .
