package filesystem

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"google.golang.org/protobuf/types/known/timestamppb"

	filesystempb "sandmartin.dev/guest/internal/gen/filesystem"
	"sandmartin.dev/guest/internal/metadata"
	"sandmartin.dev/guest/internal/users"
)

// describe returns what is known of the file at path, called shown. For a link the type is its
// target's. Names need not be text, but what is sent must be.
func describe(path, shown string, names *users.Names) (*filesystempb.EntryInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	stat := info.Sys().(*syscall.Stat_t)
	entry := &filesystempb.EntryInfo{
		Name: text(filepath.Base(shown)), Path: text(shown), Type: typeOf(info.Mode()), Size: info.Size(),
		Mode: uint32(stat.Mode & 0o7777), Permissions: permissions(info.Mode()),
		Owner: names.User(stat.Uid), Group: names.Group(stat.Gid),
		ModifiedTime: timestamppb.New(info.ModTime()),
	}
	if info.Mode()&fs.ModeSymlink == 0 {
		entry.Metadata = told(path, info.Mode())
		return entry, nil
	}
	entry.IsSymlink = true
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		target, err = os.Readlink(path)
	}
	if err == nil {
		target = text(target)
		entry.SymlinkTarget = &target
	}
	if followed, err := os.Stat(path); err == nil {
		entry.Type, entry.Metadata = typeOf(followed.Mode()), told(path, followed.Mode())
	}
	return entry, nil
}

// told is what the file at path is kept with; only files and directories can have it.
func told(path string, mode fs.FileMode) map[string]string {
	if !mode.IsRegular() && !mode.IsDir() {
		return nil
	}
	return metadata.Read(path)
}

func text(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }

func typeOf(mode fs.FileMode) filesystempb.FileType {
	switch {
	case mode.IsRegular():
		return filesystempb.FileType_FILE_TYPE_FILE
	case mode.IsDir():
		return filesystempb.FileType_FILE_TYPE_DIRECTORY
	case mode&fs.ModeSymlink != 0:
		return filesystempb.FileType_FILE_TYPE_SYMLINK
	}
	return filesystempb.FileType_FILE_TYPE_UNSPECIFIED
}

func permissions(mode fs.FileMode) string {
	kind := "-"
	switch {
	case mode.IsDir():
		kind = "d"
	case mode&fs.ModeSymlink != 0:
		kind = "l"
	}
	return kind + mode.Perm().String()[1:]
}
