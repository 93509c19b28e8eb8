package vm

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// ErrMissing says that this machine lacks what booting a guest needs.
var ErrMissing = errors.New("no guest can be booted here: run hack/vm/kernel.sh")

// Kernel is what a guest boots from: files of the host.
type Kernel struct {
	image   string
	modules string // the directory of its modules
	qemu    string
	busybox string
}

// FindKernel finds the kernel where hack/vm/kernel.sh puts it. An error that
// matches [ErrMissing] says what there is not.
func FindKernel() (*Kernel, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMissing, err)
	}
	dir := filepath.Join(cache, "nvmmirror", "vm", "kernel")
	k := &Kernel{image: filepath.Join(dir, "vmlinux")}
	if _, err := os.Stat(k.image); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMissing, err)
	}
	releases, err := filepath.Glob(filepath.Join(dir, "lib/modules/*"))
	if err != nil || len(releases) != 1 {
		return nil, fmt.Errorf("%w: %d releases in %s/lib/modules", ErrMissing, len(releases), dir)
	}
	k.modules = releases[0]
	if runtime.GOARCH != "amd64" {
		return nil, fmt.Errorf("%w: the guest runs programs of this host, and is amd64, not %s", ErrMissing, runtime.GOARCH)
	}
	for tool, path := range map[string]*string{"qemu-system-x86_64": &k.qemu, "busybox": &k.busybox, "ndctl": nil, "blkid": nil, "mkfs.ext4": nil, "mkfs.xfs": nil} {
		found, err := lookPath(tool)
		if err != nil {
			return nil, err
		}
		if path != nil {
			*path = found
		}
	}
	return k, nil
}

// lookPath also finds what only root has in its path.
func lookPath(tool string) (string, error) {
	path, err := exec.LookPath(tool)
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if err == nil {
			return path, nil
		}
		path, err = exec.LookPath(dir + tool)
	}
	if err != nil {
		return "", fmt.Errorf("%w: no %s", ErrMissing, tool)
	}
	return path, nil
}

// Release is the kernel's version.
func (k *Kernel) Release() string { return filepath.Base(k.modules) }

// inOrder are the files of the named modules and of all that they depend on,
// each after what it needs. A name that the kernel has no module for is built
// in, or is missing, which the guest finds out.
func (k *Kernel) inOrder(names ...string) ([]string, error) {
	f, err := os.Open(filepath.Join(k.modules, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("vm: %w", err)
	}
	defer f.Close()
	needs := map[string][]string{} // by file
	files := map[string]string{}   // by name
	for lines := bufio.NewScanner(f); lines.Scan(); {
		file, list, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("vm: %s has the line %q", f.Name(), lines.Text())
		}
		name, _, _ := strings.Cut(filepath.Base(file), ".")
		files[strings.ReplaceAll(name, "-", "_")] = file
		needs[file] = strings.Fields(list)
	}
	var order []string
	var add func(file string)
	add = func(file string) {
		if slices.Contains(order, file) {
			return
		}
		for _, n := range needs[file] {
			add(n)
		}
		order = append(order, file)
	}
	for _, name := range names {
		if file, ok := files[name]; ok {
			add(file)
		}
	}
	for i, file := range order {
		order[i] = filepath.Join(k.modules, file)
		if _, err := os.Stat(order[i]); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("vm: module %s is in modules.dep, but: %w", file, err)
		}
	}
	return order, nil
}
