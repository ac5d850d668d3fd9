package container

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// maxHosts is the maximum size in bytes of an image's /etc/hosts that is changed.
const maxHosts = 1 << 20

// writeEtc writes the files of /etc that programs expect from a container's runtime, where the image at root lacks
// them. They are hosts, so that "localhost" and the host name have addresses, and hostname. Entries of the image stay
// as they are. It ignores a file that it cannot write, because a container can run without these files.
//
// The image is not trusted: no link leads out of root, and only regular files are written. Root must not have other
// file systems mounted in it.
func writeEtc(root, hostname string) {
	dir, err := os.Open(root)
	if err != nil {
		return
	}
	defer dir.Close()
	_ = unix.Mkdirat(int(dir.Fd()), "etc", 0o755) // fails if the image has it
	changeFile(dir, "etc/hosts", func(hosts string) string { return hosts + missingHosts(hosts, hostname) })
	changeFile(dir, "etc/hostname", func(name string) string {
		if strings.TrimSpace(name) != "" || hostname == "" {
			return name
		}
		return name + hostname + "\n"
	})
}

// renameInEtc changes the host name in the files that writeEtc has written, where it is still as writeEtc writes it. Like
// writeEtc, it does not trust the files at root.
func renameInEtc(root, old, hostname string) {
	dir, err := os.Open(root)
	if err != nil {
		return
	}
	defer dir.Close()
	changeFile(dir, "etc/hosts", func(hosts string) string {
		hosts = strings.ReplaceAll("\n"+hosts, "\n"+hostLine(old), "\n")[1:]
		return hosts + missingHosts(hosts, hostname)
	})
	changeFile(dir, "etc/hostname", func(name string) string {
		if strings.TrimSpace(name) != old {
			return name
		}
		return hostname + "\n"
	})
}

// changeFile replaces the file's content by what change returns for it. It creates the file if it does not exist.
func changeFile(root *os.File, path string, change func(content string) string) {
	// O_NONBLOCK keeps the open of a FIFO from blocking.
	f, err := openInRoot(root, path, unix.O_RDWR|unix.O_CREAT|unix.O_NONBLOCK)
	if err != nil {
		return
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > maxHosts {
		return
	}
	content, err := io.ReadAll(io.LimitReader(f, maxHosts))
	if err != nil {
		return
	}
	changed := change(string(content))
	// Write what has changed only, in a single write, so that a program that reads the file meanwhile finds the rest.
	same := 0
	for same < min(len(content), len(changed)) && content[same] == changed[same] {
		same++
	}
	if rest := changed[same:]; rest != "" {
		if _, err := f.WriteAt([]byte(rest), int64(same)); err != nil {
			return // the disk is full: the rest of the old content stays
		}
	}
	if len(changed) < len(content) {
		_ = f.Truncate(int64(len(changed)))
	}
}

// hostLine returns the line of a hosts file for the host name.
func hostLine(hostname string) string { return "127.0.1.1\t" + hostname + "\n" }

// openInRoot opens path as if root were the root directory.
func openInRoot(root *os.File, path string, flags uint64) (*os.File, error) {
	how := &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV}
	if flags&unix.O_CREAT != 0 {
		how.Mode = 0o644
	}
	fd, err := unix.Openat2(int(root.Fd()), path, how)
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// missingHosts returns the lines to append to hosts, the content of a hosts file, so that localhost has an IPv4 and an
// IPv6 address and the host name has an address.
func missingHosts(hosts, hostname string) string {
	var localhost4, localhost6, host bool
	for line := range strings.Lines(hosts) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		addr, err := netip.ParseAddr(fields[0])
		if err != nil {
			continue
		}
		for _, name := range fields[1:] {
			localhost4 = localhost4 || strings.EqualFold(name, "localhost") && addr.Is4()
			localhost6 = localhost6 || strings.EqualFold(name, "localhost") && addr.Is6()
			host = host || strings.EqualFold(name, hostname)
		}
	}
	var b strings.Builder
	if !localhost4 {
		fmt.Fprintln(&b, "127.0.0.1\tlocalhost")
	}
	if !localhost6 {
		fmt.Fprintln(&b, "::1\tlocalhost ip6-localhost ip6-loopback")
	}
	if !host && hostname != "" && !strings.EqualFold(hostname, "localhost") {
		b.WriteString(hostLine(hostname))
	}
	if b.Len() > 0 && hosts != "" && !strings.HasSuffix(hosts, "\n") {
		return "\n" + b.String()
	}
	return b.String()
}
