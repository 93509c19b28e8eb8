package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// place is what stood at a path.
type place struct {
	path string
	was  fs.FileInfo // nil: not watched
}

// placeOf is what stands there now, where want wants it to be watched.
func placeOf(path string, want func(fs.FileMode) bool) place {
	info, err := os.Stat(path)
	if err != nil || !want(info.Mode()) {
		return place{path: path}
	}
	return place{path, info}
}

// look is what stands there now, nil where that is not known; gone where it is
// something else, or nothing.
func (p *place) look() (now fs.FileInfo, gone bool) {
	if p.was == nil {
		return nil, false
	}
	info, err := os.Stat(p.path)
	switch {
	case err == nil && os.SameFile(info, p.was):
		return info, false
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, false
	}
	return nil, true
}

// regionFile is the file at a region's path as it was when the region was
// opened. The mapping outlives its name: a daemon goes on when the file is
// removed, moved or replaced, and the next one does not find what it wrote. It
// outlives its pages too: where the file was cut off, only who touches what is gone
// meets an error.
type regionFile struct{ place }

// watchRegionFile is called when the region at path is open. A device stays where it
// is.
func watchRegionFile(path string) *regionFile {
	return &regionFile{placeOf(path, fs.FileMode.IsRegular)}
}

// degraded is the reason, where there is one.
func (f *regionFile) degraded() []string {
	now, gone := f.look()
	switch {
	case gone:
		return []string{fmt.Sprintf("the region file %s was removed, moved or replaced: where it was not moved, all that this node holds is lost when the daemon stops; move it back, or copy the data out, or put the peer in charge", f.path)}
	case now != nil && now.Size() < f.was.Size():
		return []string{fmt.Sprintf("the region file %s was cut off: %d bytes of %d are left, and what lay behind them is lost here, also if the file grows again; put the peer in charge, stop this daemon, and make the region anew, which the peer then fills; without a peer, copy out what can still be read", f.path, now.Size(), f.was.Size())}
	}
	return nil
}

// socketFile is the admin socket as it was when it was made. Without its name the
// daemon cannot be asked or told anything.
type socketFile struct{ place }

// watchSocket is called when the socket at path is made.
func watchSocket(path string) *socketFile {
	return &socketFile{placeOf(path, func(fs.FileMode) bool { return true })}
}

// degraded is the reason, where there is one.
func (f *socketFile) degraded() []string {
	if _, gone := f.look(); gone {
		return []string{fmt.Sprintf("the admin socket %s was removed or replaced: no command reaches this daemon; stop it by SIGTERM and start it again, which makes the socket anew", f.path)}
	}
	return nil
}
