package vm

import (
	"bytes"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

//go:embed init.sh
var initScript []byte

//go:embed agent.sh
var agentScript []byte

// modules are what the guest loads: its root, the memory under test, and the
// kernel's MD5 for sockets. Those of a CRC are not wanted by name, but by
// checksums in the file systems.
var modules = []string{
	"virtio_pci", "9pnet_virtio", "9p", "overlay",
	"nfit", "nd_pmem", "dax_pmem", "device_dax",
	"crc32c_generic", "crc32c_intel", "ext4", "xfs",
	"algif_hash", "md5",
}

// initramfs is the archive that the guest starts from.
func (k *Kernel) initramfs() ([]byte, error) {
	var a archive
	for _, dir := range []string{"bin", "dev", "proc", "lower", "upper", "root"} {
		a.add(dir, 0o040755, nil)
	}
	a.add("init", 0o100755, initScript)
	a.add("agent.sh", 0o100644, agentScript)
	busybox, err := os.ReadFile(k.busybox)
	if err != nil {
		return nil, fmt.Errorf("vm: %w", err)
	}
	a.add("bin/busybox", 0o100755, busybox)
	files, err := k.inOrder(modules...)
	if err != nil {
		return nil, err
	}
	var list strings.Builder
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("vm: %w", err)
		}
		a.add(filepath.Base(file), 0o100644, content)
		fmt.Fprintln(&list, filepath.Base(file))
	}
	a.add("modules", 0o100644, []byte(list.String()))
	return a.end(), nil
}

// archive writes cpio's "newc" format, which the kernel unpacks.
type archive struct {
	buf   bytes.Buffer
	inode int
}

func (a *archive) add(name string, mode int, content []byte) {
	a.inode++
	links := 1
	// Magic; inode, mode, uid, gid, links, mtime, size; four device numbers;
	// length of the name with its NUL; checksum, which this format has not.
	fmt.Fprintf(&a.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad()
	a.buf.Write(content)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

func (a *archive) end() []byte {
	a.add("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}
