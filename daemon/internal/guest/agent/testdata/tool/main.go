// Command tool is what the tests run in a container: one small program with many names.
package main

import (
	"bufio"
	"bytes"
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
	case "streams": // says args[0] on stdout, args[1] on stderr and ends with args[2]
		fmt.Print(args[0])
		fmt.Fprint(os.Stderr, args[1])
		code, _ := strconv.Atoi(args[2])
		os.Exit(code)
	case "copy": // stdin to stdout
		_, err := io.Copy(os.Stdout, os.Stdin)
		return err
	case "wait": // until killed
		ch := make(chan os.Signal, 1)
		signal.Notify(ch, syscall.SIGUSR1)
		fmt.Println("waiting")
		fmt.Println("got", <-ch)
		os.Exit(7)
	case "print": // args[0] bytes
		n, _ := strconv.Atoi(args[0])
		_, err := io.WriteString(os.Stdout, strings.Repeat("x", n))
		return err
	case "orphan": // leaves a child behind that holds the streams
		c := exec.Command("/tool", "wait")
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		if err := c.Start(); err != nil {
			return err
		}
		fmt.Println("parent ends")
	case "eat": // memory, args[0] MiB
		n, _ := strconv.Atoi(args[0])
		b := make([]byte, n<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		fmt.Println("ate", len(b))
	case "files": // prints files, one line each: name and content, or the error
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
	case "list": // directories
		for _, dir := range args {
			names, err := filepath.Glob(dir + "/*")
			if err != nil {
				return err
			}
			fmt.Println(strings.Join(names, " "))
		}
	case "write": // tries to write to each file
		for _, path := range args {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
			if err == nil {
				f.Close()
			}
			fmt.Printf("%s: %v\n", path, err == nil)
		}
	case "self": // who and where
		host, _ := os.Hostname()
		cwd, _ := os.Getwd()
		groups, _ := os.Getgroups()
		var files syscall.Rlimit
		_ = syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files)
		fmt.Println(os.Getpid(), os.Getuid(), os.Getgid(), groups, host, cwd, os.Getenv("HOME"), os.Getenv("X"), files.Max)
	case "head": // prints the first bytes of files, or that they cannot be read
		for _, f := range args {
			fmt.Printf("%s: %s\n", f, head(f))
		}
	case "mknod": // makes a block device of the numbers args[1] and args[2] at args[0], and prints its first bytes
		major, _ := strconv.Atoi(args[1])
		minor, _ := strconv.Atoi(args[2])
		if err := syscall.Mknod(args[0], syscall.S_IFBLK|0o600, major<<8|minor); err != nil {
			return err
		}
		fmt.Println(head(args[0]))
	case "put": // writes args[1] to the file args[0]
		return os.WriteFile(args[0], []byte(args[1]), 0o644)
	case "now": // prints the time
		fmt.Println(time.Now().Unix())
	case "listen": // at an address, with nobody calling
		l, err := net.Listen("tcp", args[0])
		if err != nil {
			return err
		}
		fmt.Println("listening")
		return l.Close()
	case "neighbour": // says whether the kernel knows a network card's address
		mac, err := net.ParseMAC(args[0])
		if err != nil {
			return err
		}
		table, err := syscall.NetlinkRIB(syscall.RTM_GETNEIGH, syscall.AF_UNSPEC)
		fmt.Println(bytes.Contains(table, mac))
		return err
	case "nest": // goes into a control group of its own below the container's, which hands its controllers down
		if err := enterGroup("init"); err != nil {
			return err
		}
		if err := os.WriteFile(cgroups+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil {
			return err
		}
		return run("wait", nil)
	case "nesteat": // args[0] MiB in a group with a limit of args[1] MiB
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
		return fmt.Errorf("unknown tool %q", name)
	}
	return nil
}

const cgroups = "/sys/fs/cgroup"

func enterGroup(name string) error {
	if err := os.Mkdir(cgroups+"/"+name, 0o755); err != nil && !os.IsExist(err) {
		return err
	}
	return os.WriteFile(cgroups+"/"+name+"/cgroup.procs", strconv.AppendInt(nil, int64(os.Getpid()), 10), 0)
}

// head returns the first bytes of a file, quoted, or the error.
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

func printSize() {
	var size [4]uint16
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, 0, syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size)))
	fmt.Printf("size %dx%d %v\n", size[0], size[1], errno == 0)
}
