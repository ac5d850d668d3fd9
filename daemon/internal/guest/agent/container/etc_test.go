package container

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	localhost4 = "127.0.0.1\tlocalhost\n"
	localhost6 = "::1\tlocalhost ip6-localhost ip6-loopback\n"
	ownName    = "127.0.1.1\tsandbox\n"
)

func TestMissingHosts(t *testing.T) {
	for hosts, want := range map[string]string{
		"":                      localhost4 + localhost6 + ownName,
		"# 127.0.0.1 localhost": "\n" + localhost4 + localhost6 + ownName,
		"10.0.0.1 db\n":         localhost4 + localhost6 + ownName,
		"127.0.0.1 localhost":   "\n" + localhost6 + ownName,
		"127.0.0.1 my LOCALHOST\n::1 localhost\n": ownName,
		"10.0.0.1 sandbox localhost\n":            localhost6,
		"nonsense localhost sandbox\n":            localhost4 + localhost6 + ownName,
		localhost4 + localhost6 + ownName:         "",
	} {
		if got := missingHosts(hosts, "sandbox"); got != want {
			t.Errorf("missingHosts(%q) = %q, want %q", hosts, got, want)
		}
	}
	if got, want := missingHosts("", ""), localhost4+localhost6; got != want {
		t.Errorf("missingHosts without a host name = %q, want %q", got, want)
	}
}

// TestWriteEtc prepares the /etc of images, including hostile ones.
func TestWriteEtc(t *testing.T) {
	const all = localhost4 + localhost6 + ownName
	for name, tt := range map[string]struct {
		image    func(t *testing.T, root, outside string)
		hosts    string // the content of hosts as seen in the image, or "" if it cannot be written
		hostname string
	}{
		"no files": {func(t *testing.T, root, _ string) { mkdir(t, root+"/etc") }, all, "sandbox\n"},
		"empty files": {func(t *testing.T, root, _ string) {
			write(t, root+"/etc/hosts", "")
			write(t, root+"/etc/hostname", "\n")
		}, all, "\nsandbox\n"},
		"files with content": {func(t *testing.T, root, _ string) {
			write(t, root+"/etc/hosts", "10.0.0.1 db\n")
			write(t, root+"/etc/hostname", "own\n")
		}, "10.0.0.1 db\n" + all, "own\n"},
		"link to a host file":      {link("etc/hosts", "OUTSIDE/file"), "", "sandbox\n"},
		"link that leads upwards":  {link("etc/hosts", "../../outside/file"), "", "sandbox\n"},
		"link to a host directory": {link("etc", "OUTSIDE"), "", ""},
		"link within the image": {func(t *testing.T, root, outside string) {
			write(t, root+"/usr/etc/hosts", "")
			link("etc", "/usr/etc")(t, root, outside)
		}, all, "sandbox\n"},
		"FIFO": {func(t *testing.T, root, _ string) {
			mkdir(t, root+"/etc")
			if err := unix.Mkfifo(root+"/etc/hosts", 0o600); err != nil {
				t.Fatal(err)
			}
		}, "", "sandbox\n"},
		"directory": {func(t *testing.T, root, _ string) { mkdir(t, root+"/etc/hosts") }, "", "sandbox\n"},
		"no /etc":   {func(*testing.T, string, string) {}, all, "sandbox\n"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			root, outside := dir+"/root", dir+"/outside"
			mkdir(t, root)
			write(t, outside+"/file", "untouched")
			tt.image(t, root, outside)
			writeEtc(root, "sandbox")

			if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
				t.Errorf("the directory outside of the image has %d files, %v; want 1", len(entries), err)
			}
			if data, _ := os.ReadFile(outside + "/file"); string(data) != "untouched" {
				t.Errorf("the file outside of the image was changed to %q", data)
			}
			for file, want := range map[string]string{"hosts": tt.hosts, "hostname": tt.hostname} {
				if want == "" {
					continue
				}
				path := root + "/etc/" + file
				if name == "link within the image" {
					path = root + "/usr/etc/" + file
				}
				if data, err := os.ReadFile(path); err != nil || string(data) != want {
					t.Errorf("%s is %q, %v; want %q", file, data, err, want)
				}
			}
		})
	}
}

// TestRenameInEtc changes the host name in files of /etc, as the agent has written them, and as an image or a program has.
func TestRenameInEtc(t *testing.T) {
	const newName = "127.0.1.1\tbox\n"
	for name, tt := range map[string]struct{ hosts, hostname, wantHosts, wantHostname string }{
		"the agent's":         {localhost4 + localhost6 + ownName, "sandbox\n", localhost4 + localhost6 + newName, "box\n"},
		"with an end":         {localhost4 + localhost6 + ownName + "10.0.0.1 db\n", "\nsandbox\n", localhost4 + localhost6 + "10.0.0.1 db\n" + newName, "box\n"},
		"at the start":        {ownName + localhost4 + localhost6, "sandbox", localhost4 + localhost6 + newName, "box\n"},
		"the image's":         {localhost4 + localhost6 + "10.0.0.1 sandbox box\n", "own\n", localhost4 + localhost6 + "10.0.0.1 sandbox box\n", "own\n"},
		"with other names":    {localhost4 + localhost6 + "127.0.1.1\tsandbox db\n", "sandbox.example\n", localhost4 + localhost6 + "127.0.1.1\tsandbox db\n" + newName, "sandbox.example\n"},
		"a part of the other": {localhost4 + localhost6 + "127.0.1.1\tsandbox-db\n", "sandbox-db\n", localhost4 + localhost6 + "127.0.1.1\tsandbox-db\n" + newName, "sandbox-db\n"},
		"removed":             {"", "", localhost4 + localhost6 + newName, ""},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			write(t, root+"/etc/hosts", tt.hosts)
			write(t, root+"/etc/hostname", tt.hostname)
			renameInEtc(root, "sandbox", "box")
			for file, want := range map[string]string{"hosts": tt.wantHosts, "hostname": tt.wantHostname} {
				if data, err := os.ReadFile(root + "/etc/" + file); err != nil || string(data) != want {
					t.Errorf("%s is %q, %v; want %q", file, data, err, want)
				}
			}
		})
	}
	dir := t.TempDir()
	write(t, dir+"/outside", "sandbox\n")
	link("etc/hostname", "../../outside")(t, dir+"/root", dir)
	renameInEtc(dir+"/root", "sandbox", "box")
	if data, _ := os.ReadFile(dir + "/outside"); string(data) != "sandbox\n" {
		t.Errorf("a file outside of the root was changed to %q", data)
	}
}

// link returns a function that creates a symbolic link in an image. "OUTSIDE" in its target is a directory of the host.
func link(path, target string) func(t *testing.T, root, outside string) {
	return func(t *testing.T, root, outside string) {
		if rest, ok := strings.CutPrefix(target, "OUTSIDE"); ok {
			target = outside + rest
		}
		mkdir(t, filepath.Dir(filepath.Join(root, path)))
		if err := os.Symlink(target, filepath.Join(root, path)); err != nil {
			t.Fatal(err)
		}
	}
}

func mkdir(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	mkdir(t, filepath.Dir(path))
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}
