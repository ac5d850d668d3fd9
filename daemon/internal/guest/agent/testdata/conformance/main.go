// Command conformance is a program that the conformance test runs in its containers, in addition to testdata/tool.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(name string) error {
	switch name {
	case "view":
		v, err := readView("/guest/proc", "/guest/cgroup")
		if err != nil {
			return err
		}
		return json.NewEncoder(os.Stdout).Encode(v)
	case "sink": // reads all of its input and prints its size
		n, err := io.Copy(io.Discard, os.Stdin)
		fmt.Println(n)
		return err
	case "flood": // writes forever
		line := []byte(strings.Repeat("x", 4095) + "\n")
		for {
			if _, err := os.Stdout.Write(line); err != nil {
				return err
			}
		}
	default:
		return fmt.Errorf("unknown command %q", name)
	}
}

// view holds the resources of a guest, as found in its /proc and cgroups.
type view struct {
	// Start is the start time of PID 1, in clock ticks since the kernel booted.
	Start string
	// Files counts PID 1's open files by kind. Threads is the number of its threads. KiB is its resident memory.
	Files        map[string]int
	Threads, KiB int
	// Processes are all processes, except for kernel threads and this process.
	Processes []string
	Mounts    []string // mount points
	Groups    []string // cgroups
	// Tainted is the kernel's taint, which is not 0 after a kernel warning or crash.
	Tainted string
}

// readView returns the resources of the guest whose /proc and cgroups are at proc and cgroup.
func readView(proc, cgroup string) (view, error) {
	v := view{Files: make(map[string]int)}
	init, err := readStat(proc + "/1/stat")
	if err != nil {
		return v, err
	}
	v.Start = init[19]
	fds, err := os.ReadDir(proc + "/1/fd")
	if err != nil {
		return v, err
	}
	for _, fd := range fds {
		target, err := os.Readlink(proc + "/1/fd/" + fd.Name())
		if err != nil {
			continue // closed in the meantime
		}
		kind, _, _ := strings.Cut(target, ":[")
		v.Files[kind]++
	}
	status, err := os.ReadFile(proc + "/1/status")
	if err != nil {
		return v, err
	}
	for line := range strings.Lines(string(status)) {
		f := strings.Fields(line)
		switch f[0] {
		case "Threads:":
			v.Threads, _ = strconv.Atoi(f[1])
		case "VmRSS:":
			v.KiB, _ = strconv.Atoi(f[1])
		}
	}
	if v.Processes, err = processes(proc); err != nil {
		return v, err
	}
	mounts, err := os.ReadFile(proc + "/1/mountinfo")
	if err != nil {
		return v, err
	}
	for line := range strings.Lines(string(mounts)) {
		v.Mounts = append(v.Mounts, strings.Fields(line)[4])
	}
	slices.Sort(v.Mounts)
	groups, err := filepath.Glob(cgroup + "/*/cgroup.procs")
	if err != nil {
		return v, err
	}
	for _, g := range groups {
		v.Groups = append(v.Groups, filepath.Base(filepath.Dir(g)))
	}
	tainted, err := os.ReadFile(proc + "/sys/kernel/tainted")
	v.Tainted = strings.TrimSpace(string(tainted))
	return v, err
}

// processes returns all processes, except for kernel threads and this process.
func processes(proc string) ([]string, error) {
	self, err := os.Readlink(proc + "/self")
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob(proc + "/[0-9]*")
	if err != nil {
		return nil, err
	}
	var list []string
	for _, dir := range dirs {
		stat, err := readStat(dir + "/stat")
		pid := filepath.Base(dir)
		if err != nil || pid == self || pid == "2" || stat[1] == "2" {
			continue
		}
		name, _ := os.ReadFile(dir + "/comm")
		list = append(list, fmt.Sprintf("%s %s %s", pid, strings.TrimSpace(string(name)), stat[0]))
	}
	return list, nil
}

// readStat returns the fields of a file /proc/PID/stat that follow the process's name: state, parent, …
func readStat(path string) ([]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:])), nil
}
