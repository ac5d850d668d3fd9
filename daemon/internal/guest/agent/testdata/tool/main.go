// Command tool is a program that the tests run in containers. Its first argument selects what it does.
package main

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(name string, args []string) error {
	switch name {
	case "streams": // prints args[0] on stdout and args[1] on stderr, and exits with the status args[2]
		fmt.Print(args[0])
		fmt.Fprint(os.Stderr, args[1])
		code, _ := strconv.Atoi(args[2])
		os.Exit(code)
	case "copy": // copies stdin to stdout
		_, err := io.Copy(os.Stdout, os.Stdin)
		return err
	case "wait": // waits until it is killed, or exits with the status 7 on SIGUSR1
		ch := make(chan os.Signal, 1)
		signal.Notify(ch, syscall.SIGUSR1)
		fmt.Println("waiting")
		fmt.Println("got", <-ch)
		os.Exit(7)
	case "print": // prints args[0] bytes
		n, _ := strconv.Atoi(args[0])
		_, err := io.WriteString(os.Stdout, strings.Repeat("x", n))
		return err
	case "orphan": // exits and leaves a child in the background that holds the streams open
		c := exec.Command("/tool", "wait")
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		if err := c.Start(); err != nil {
			return err
		}
		fmt.Println("parent ends")
	case "eat": // allocates args[0] MiB of memory
		n, _ := strconv.Atoi(args[0])
		b := make([]byte, n<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		fmt.Println("ate", len(b))
	case "files": // prints a line for each file: its name, its content, and whether there was an error
		for _, f := range args {
			data, err := os.ReadFile(f)
			fmt.Printf("%s: %q %v\n", f, data, err != nil)
		}
	case "status": // prints fields of /proc/self/status
		f, err := os.Open("/proc/self/status")
		if err != nil {
			return err
		}
		for s := bufio.NewScanner(f); s.Scan(); {
			for _, a := range args {
				if strings.HasPrefix(s.Text(), a+":") {
					fmt.Println(strings.Join(strings.Fields(s.Text()), " "))
				}
			}
		}
	case "list": // prints a line for each directory with the paths of its files
		for _, dir := range args {
			names, err := filepath.Glob(dir + "/*")
			if err != nil {
				return err
			}
			fmt.Println(strings.Join(names, " "))
		}
	case "write": // prints for each file whether it can be opened for writing
		for _, path := range args {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
			if err == nil {
				f.Close()
			}
			fmt.Printf("%s: %v\n", path, err == nil)
		}
	case "self": // prints its ids, host name, working directory, environment and limit on open files
		host, _ := os.Hostname()
		cwd, _ := os.Getwd()
		groups, _ := os.Getgroups()
		var files syscall.Rlimit
		_ = syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files)
		fmt.Println(os.Getpid(), os.Getuid(), os.Getgid(), groups, host, cwd, os.Getenv("HOME"), os.Getenv("X"), files.Max)
	case "head": // prints the first bytes of each file, or the error
		for _, f := range args {
			fmt.Printf("%s: %s\n", f, head(f))
		}
	case "mknod": // creates a block device at args[0] with the numbers args[1] and args[2], and prints its first bytes
		major, _ := strconv.Atoi(args[1])
		minor, _ := strconv.Atoi(args[2])
		if err := syscall.Mknod(args[0], syscall.S_IFBLK|0o600, major<<8|minor); err != nil {
			return err
		}
		fmt.Println(head(args[0]))
	case "disks": // creates a device in args[0] for each disk that has a serial number, and prints its first bytes
		files, _ := filepath.Glob("/sys/block/*/serial")
		for _, file := range files {
			serial, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if len(serial) == 0 {
				continue
			}
			number, err := os.ReadFile(filepath.Dir(file) + "/dev")
			if err != nil {
				return err
			}
			var major, minor int
			if _, err := fmt.Sscanf(string(number), "%d:%d", &major, &minor); err != nil {
				return err
			}
			device := filepath.Join(args[0], strings.TrimSpace(string(serial)))
			if err := syscall.Mknod(device, syscall.S_IFBLK|0o600, major<<8|minor); err != nil {
				return err
			}
			fmt.Printf("%s: %s\n", filepath.Base(device), head(device))
		}
	case "fill": // writes to the file args[0] until that fails
		f, err := os.Create(args[0])
		if err != nil {
			return err
		}
		for block := make([]byte, 1<<20); ; {
			if _, err := f.Write(block); err != nil {
				return err
			}
			if err := f.Sync(); err != nil { // also an error that comes late
				return err
			}
		}
	case "remove": // removes the file args[0]
		return os.Remove(args[0])
	case "xattr": // prints the attribute args[1] of the file args[0], sets it to args[2], and prints it again, in hexadecimal
		value, err := hex.DecodeString(args[2])
		if err != nil {
			return err
		}
		for range 2 {
			old := make([]byte, 64)
			n, err := syscall.Getxattr(args[0], args[1], old)
			if err == nil {
				fmt.Printf("%x ", old[:n])
			} else {
				fmt.Printf("%v ", err)
			}
			if err := syscall.Setxattr(args[0], args[1], value, 0); err != nil {
				return err
			}
		}
	case "stat": // prints the mode and the owner of each file
		for _, f := range args {
			var st syscall.Stat_t
			if err := syscall.Lstat(f, &st); err != nil {
				return err
			}
			fmt.Printf("%s: %o %d:%d\n", f, st.Mode, st.Uid, st.Gid)
		}
	case "put": // writes args[1] to the file args[0]
		return os.WriteFile(args[0], []byte(args[1]), 0o644)
	case "now": // prints the time
		fmt.Println(time.Now().Unix())
	case "clock": // prints the time in nanoseconds for each line of input
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			fmt.Println(time.Now().UnixNano())
		}
	case "listen": // listens at the address args[0] and exits
		l, err := net.Listen("tcp", args[0])
		if err != nil {
			return err
		}
		fmt.Println("listening")
		return l.Close()
	case "connect": // connects to the address args[0], from args[1], over TCP, and prints the error, or what arrives until the end
		var d net.Dialer
		if len(args) > 1 {
			local, err := net.ResolveTCPAddr("tcp", args[1])
			if err != nil {
				return err
			}
			d.LocalAddr = local
			d.Control = func(_, _ string, raw syscall.RawConn) error {
				return raw.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_FREEBIND, 1) })
			}
		}
		c, err := d.Dial("tcp", args[0])
		if err != nil {
			var errno syscall.Errno
			errors.As(err, &errno)
			fmt.Println(errno)
			return nil
		}
		data, err := io.ReadAll(c)
		fmt.Printf("%q %v\n", data, err)
	case "sockets": // prints the error, if there is one, of opening a raw, a packet and a ping socket
		for _, kind := range [][3]int{
			{syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_ICMP}, {syscall.AF_PACKET, syscall.SOCK_RAW, 0},
			{syscall.AF_INET, syscall.SOCK_DGRAM, syscall.IPPROTO_ICMP},
		} {
			_, err := syscall.Socket(kind[0], kind[1], kind[2])
			fmt.Println(err)
		}
	case "neighbor": // prints whether the kernel's neighbor table has the MAC address args[0]
		mac, err := net.ParseMAC(args[0])
		if err != nil {
			return err
		}
		table, err := syscall.NetlinkRIB(syscall.RTM_GETNEIGH, syscall.AF_UNSPEC)
		fmt.Println(bytes.Contains(table, mac))
		return err
	case "nest": // enters a new cgroup below the container's, delegates the memory controller, and waits
		if err := enterGroup("init"); err != nil {
			return err
		}
		if err := os.WriteFile(cgroups+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil {
			return err
		}
		return run("wait", nil)
	case "nesteat": // allocates args[0] MiB in a cgroup with a limit of args[1] MiB
		limit, _ := strconv.Atoi(args[1])
		if err := os.Mkdir(cgroups+"/eaters", 0o755); err != nil && !os.IsExist(err) {
			return err
		}
		if err := os.WriteFile(cgroups+"/eaters/memory.max", strconv.AppendInt(nil, int64(limit)<<20, 10), 0); err != nil {
			return err
		}
		if err := enterGroup("eaters"); err != nil {
			return err
		}
		return run("eat", args[:1])
	case "tty": // prints its terminal's size, before and after a line of input
		printSize()
		if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
			return err
		}
		printSize()
	default:
		return fmt.Errorf("unknown command %q", name)
	}
	return nil
}

const cgroups = "/sys/fs/cgroup"

// enterGroup creates a cgroup below the container's and moves this process into it.
func enterGroup(name string) error {
	if err := os.Mkdir(cgroups+"/"+name, 0o755); err != nil && !os.IsExist(err) {
		return err
	}
	return os.WriteFile(cgroups+"/"+name+"/cgroup.procs", strconv.AppendInt(nil, int64(os.Getpid()), 10), 0)
}

// head returns up to 512 bytes of a file, quoted, or the error.
func head(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	b := make([]byte, 512)
	n, err := io.ReadFull(f, b)
	if err != nil && n == 0 {
		return err.Error()
	}
	return strconv.Quote(strings.TrimRight(string(b[:n]), "\x00"))
}

// printSize prints the size of the terminal.
func printSize() {
	var size [4]uint16
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, 0, syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size)))
	fmt.Printf("size %dx%d %v\n", size[0], size[1], errno == 0)
}
