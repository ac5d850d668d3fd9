package container

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// maxHosts is the maximum size in bytes of an image's /etc/hosts to which entries are added.
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
	addToFile(dir, "etc/hosts", func(hosts string) string { return missingHosts(hosts, hostname) })
	addToFile(dir, "etc/hostname", func(name string) string {
		if strings.TrimSpace(name) != "" || hostname == "" {
			return ""
		}
		return hostname + "\n"
	})
}

// addToFile appends what missing returns for the file's content. It creates the file if it does not exist.
func addToFile(root *os.File, path string, missing func(content string) string) {
	// O_NONBLOCK keeps the open of a FIFO from blocking.
	f, err := openInRoot(root, path, unix.O_RDWR|unix.O_APPEND|unix.O_CREAT|unix.O_NONBLOCK)
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
	if text := missing(string(content)); text != "" {
		_, _ = f.WriteString(text)
	}
}

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
		fmt.Fprintf(&b, "127.0.1.1\t%s\n", hostname)
	}
	if b.Len() > 0 && hosts != "" && !strings.HasSuffix(hosts, "\n") {
		return "\n" + b.String()
	}
	return b.String()
}
