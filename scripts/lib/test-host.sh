# Prepares what the test host is made of. Needs common.sh and suites.sh.
# shellcheck shell=bash

# Modules loaded at boot; anything else is loaded on demand, as on any host.
TH_BOOT_MODULES=(virtio_pci virtio_console virtio_blk virtio_rng 9pnet_virtio 9p overlay ext4 kvm-amd kvm-intel)

# This machine can run VMs of our own on its hardware. A /dev/kvm is no proof:
# kvm_pvm's runs only guests made for it.
hardware_kvm() {
  grep -qwE 'vmx|svm' /proc/cpuinfo && [[ -w /dev/kvm && ! -e /sys/module/kvm_pvm ]]
}

nested_kvm() {
  hardware_kvm && grep -qsE '^[Y1]' /sys/module/kvm_{intel,amd}/parameters/nested
}

# QEMU 10 emulates a nested guest about four times as fast as Debian 12's 7.2.
th_need_qemu() {
  have qemu-system-x86_64 && return
  ((EUID == 0)) || die "missing packages; as root: apt-get install qemu-system-x86"
  local codename
  codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  if [[ $codename == bookworm ]]; then
    log "installing qemu-system-x86 of $codename-backports"
    suite_apt bookworm-backports apt-get -qqy install -t bookworm-backports qemu-system-x86 >&2 && return
    log "not available; taking the one of $codename"
  fi
  need_packages qemu-system-x86
}

# Sets TH_KERNEL and TH_MODULES; unpacks Debian's kernel on first use.
th_need_kernel() {
  local dir=$CACHE/test-host/kernel package tmp rel
  if [[ ! -e $dir/ready ]]; then
    need_packages kmod
    package=''
    for p in linux-image-6.12-amd64 linux-image-amd64; do
      package=$(apt_lists; apt-cache depends "$p" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
      [[ $package ]] && break
    done
    [[ $package ]] || die "apt offers no linux-image-amd64"
    log "test host: unpacking $package"
    tmp=$(mktemp -d "$CACHE/test-host.XXXXXX")
    (cd "$tmp" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2) ||
      (cd "$tmp" && apt-get -qq update >&2 && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2) ||
      die "could not download $package"
    mkdir -p "$tmp/root/lib"
    dpkg-deb -x "$tmp"/*.deb "$tmp/root"
    [[ -d $tmp/root/usr/lib/modules ]] && mv "$tmp/root/usr/lib/modules" "$tmp/root/lib/"
    rm -f "$tmp"/*.deb
    rel=$(ls "$tmp/root/lib/modules")
    depmod -b "$tmp/root" "$rel"
    need_packages python3 zstd
    /usr/bin/python3 "$REPO/scripts/lib/unpack-vmlinuz.py" "$tmp/root/boot/vmlinuz-$rel" "$tmp/root/kernel" ||
      mv "$tmp/root/boot/vmlinuz-$rel" "$tmp/root/kernel"
    rm -rf "$tmp/root/boot"
    echo "$rel" >"$tmp/root/ready"
    rm -rf "$dir"
    mkdir -p "${dir%/*}"
    mv "$tmp/root" "$dir"
    rm -rf "$tmp"
  fi
  rel=$(<"$dir/ready")
  TH_KERNEL=$dir/kernel
  TH_MODULES=$dir/lib/modules/$rel
}

# Sets TH_INITRAMFS: busybox, the boot modules, our init and PID 1.
th_need_initramfs() {
  local lib=$REPO/scripts/lib key tmp m f
  key=$({ cat "$lib"/test-host{-init.sh,-pid1.c,.sh}; echo "$TH_MODULES"; } | sha256sum | cut -c1-16)
  TH_INITRAMFS=$CACHE/test-host/initramfs-$key
  [[ -e $TH_INITRAMFS ]] && return
  need_packages gcc libc6-dev cpio xz-utils kmod
  log "test host: making its initramfs"
  tmp=$(mktemp -d "$CACHE/test-host.XXXXXX")
  mkdir -p "$tmp/fs"/{bin,dev,proc,sys,modules}
  (cd "$tmp" && apt_lists && apt-get -qq -o APT::Sandbox::User=root download busybox-static >&2) ||
    die "could not download busybox-static"
  dpkg-deb -x "$tmp"/busybox*.deb "$tmp/busybox"
  cp "$tmp/busybox/bin/busybox" "$tmp/fs/bin/" 2>/dev/null || cp "$tmp/busybox/usr/bin/busybox" "$tmp/fs/bin/"
  for f in sh chroot grep rm mount insmod mkdir ln mknod sed hostname ip cp tr uname switch_root echo; do
    ln -s busybox "$tmp/fs/bin/$f"
  done
  gcc -O2 -Wall -static -s -o "$tmp/fs/pid1" "$lib/test-host-pid1.c"
  install -m 755 "$lib/test-host-init.sh" "$tmp/fs/init"
  for m in "${TH_BOOT_MODULES[@]}"; do
    modprobe -d "${TH_MODULES%/lib/modules/*}" -S "${TH_MODULES##*/}" --show-depends "$m" |
      sed -n 's/^insmod //p'
  done | awk '!seen[$1]++ { print $1 }' >"$tmp/list"
  while read -r f; do
    m=${f##*/}
    case $f in
      *.xz) m=${m%.xz}; xz -dc "$f" >"$tmp/fs/modules/$m" ;;
      *) cp "$f" "$tmp/fs/modules/$m" ;;
    esac
    # ftrace looks up every function of a module in its symbol table, one by
    # one: with the local symbols KVM takes an emulated CPU a second to load.
    # The signature goes as well, whose check is as dear.
    strip --strip-unneeded -R .BTF "$tmp/fs/modules/$m"
    echo "$m" >>"$tmp/fs/modules/order"
  done <"$tmp/list"
  (cd "$tmp/fs" && find . | cpio -o -H newc --quiet) >"$TH_INITRAMFS.tmp"
  mv "$TH_INITRAMFS.tmp" "$TH_INITRAMFS"
  rm -rf "$tmp"
}
