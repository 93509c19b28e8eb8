package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// regionFile is the file at a region's path as it was when the region was
// opened. The mapping outlives its name: a daemon goes on when the file is
// removed, moved or replaced, and the next one does not find what it wrote.
type regionFile struct {
	path   string
	opened fs.FileInfo // nil: not watched
}

// watchRegionFile is called when the region at path is open.
func watchRegionFile(path string) *regionFile {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() {
		return &regionFile{path: path} // a device stays where it is
	}
	return &regionFile{path, info}
}

// degraded is the reason, where there is one.
func (f *regionFile) degraded() []string {
	if f.opened == nil {
		return nil
	}
	info, err := os.Stat(f.path)
	switch {
	case err == nil && os.SameFile(info, f.opened):
		return nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil // whether it is there is not known
	}
	return []string{fmt.Sprintf("the region file %s was removed, moved or replaced: where it was not moved, all that this node holds is lost when the daemon stops; move it back, or copy the data out, or put the peer in charge", f.path)}
}
