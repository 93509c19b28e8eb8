// Package vm boots Debian's stock kernel in an emulated machine (QEMU without
// KVM) that has NVDIMMs, and drives it over a serial line. It is how tests get
// at real DAX, with MAP_SYNC, on any machine.
//
// The guest sees the host's files, read-only, with a tmpfs over them: so what
// was built here runs there. The NVDIMMs' content outlives a guest that is
// killed; the guest's own memory does not. Guest memory that is mapped from an
// NVDIMM is the host's: a store is in it at once, flushed or not. A killed guest
// therefore shows what a kernel's crash does, and not what a power cut does.
package vm
