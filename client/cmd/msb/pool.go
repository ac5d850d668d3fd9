package main

import (
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var poolCommands = &cli.Command{
	Name:        "pool",
	Usage:       "show and set the microVMs that are started in advance",
	Subcommands: []*cli.Command{poolStatus, poolSet},
}

var poolStatus = &cli.Command{
	Name:      "status",
	UsageText: "msb pool status [options]",
	Usage:     "show the microVMs that are started in advance",
	Flags:     []cli.Flag{jsonFlag},
	Action:    showPool,
}

var poolSet = &cli.Command{
	Name:      "set",
	UsageText: "msb pool set [options]",
	Usage:     "set how many microVMs of an image and size are started in advance",
	Description: "Without --image and a size, it sets the pool of the default image and size. --min 0 --max 0 removes a\n" +
		"pool. The setting stays after a restart of the server.",
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "image", Usage: "the `IMAGE` (default: the server's default image)"},
		&cli.IntFlag{Name: "cpus", Usage: "number `N` of virtual CPUs", DefaultText: "the server's"},
		&cli.GenericFlag{
			Name: "memory", Aliases: []string{"m"}, Value: &sandboxSize{least: minMemory},
			Usage: "memory `SIZE`: a number of MiB, or with a unit, such as 512m or 1g (default: the server's)",
		},
		&cli.GenericFlag{
			Name: "disk", Value: &sandboxSize{least: minDisk},
			Usage: "size of the writable disk, `SIZE`: as for --memory (default: the server's)",
		},
		&cli.IntFlag{Name: "min", Usage: "least number `N` of microVMs; required", DefaultText: "none"},
		&cli.IntFlag{Name: "max", Usage: "largest number `N` of microVMs, while many sandboxes are started; required", DefaultText: "none"},
	},
	Action: setPool,
}

// poolReport is the output of 'msb pool status --json'.
type poolReport struct {
	Off          string     `json:"off,omitempty"`
	MemoryMiB    int64      `json:"memory_mib"`
	MaxMemoryMiB int64      `json:"max_memory_mib"`
	Pools        []poolInfo `json:"pools"`
}

type poolInfo struct {
	Image     string      `json:"image"`
	CPUs      int32       `json:"cpus"`
	MemoryMiB int32       `json:"memory_mib"`
	DiskMiB   int32       `json:"disk_mib"`
	Default   bool        `json:"default"`
	Min       int32       `json:"min"`
	Max       int32       `json:"max"`
	Target    int32       `json:"target"`
	Ready     int32       `json:"ready"`
	Filling   bool        `json:"filling"`
	Hits      uint64      `json:"hits"`
	Misses    uint64      `json:"misses"`
	Failures  uint64      `json:"failures"`
	LastError string      `json:"last_error,omitempty"`
	Waits     string      `json:"waits,omitempty"`
	RetryAt   *time.Time  `json:"retry_at,omitempty"`
	Entries   []poolEntry `json:"entries"` // from the oldest to the newest
}

type poolEntry struct {
	ID          string     `json:"id"`
	CreatedAt   *time.Time `json:"created_at"`
	CPUSeconds  float64    `json:"cpu_seconds"`
	MemoryBytes uint64     `json:"memory_bytes"`
}

func showPool(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	status, err := a.PoolStatus(c.Context)
	if err != nil {
		return err
	}
	if c.Bool(jsonFlag.Name) {
		report := poolReport{Off: status.GetOff(), MemoryMiB: status.GetMemoryMib(), MaxMemoryMiB: status.GetMaxMemoryMib(), Pools: []poolInfo{}}
		for _, p := range status.GetPools() {
			t := p.GetTemplate()
			entries := []poolEntry{}
			for _, e := range p.GetEntries() {
				entries = append(entries, poolEntry{e.GetId(), jsonTime(e.GetCreatedAt()), e.GetCpuSeconds(), e.GetMemoryBytes()})
			}
			report.Pools = append(report.Pools, poolInfo{
				Image: t.GetImage(), CPUs: t.GetCpus(), MemoryMiB: t.GetMemoryMib(), DiskMiB: t.GetDiskMib(), Default: p.GetIsDefault(),
				Min: p.GetMin(), Max: p.GetMax(), Target: p.GetTarget(), Ready: p.GetReady(), Filling: p.GetFilling(), Hits: p.GetHits(),
				Misses: p.GetMisses(), Failures: p.GetFailures(), LastError: p.GetLastError(), Waits: p.GetWaits(), RetryAt: jsonTime(p.GetRetryAt()),
				Entries: entries,
			})
		}
		return printJSON(c, report)
	}
	if status.GetOff() != "" {
		fmt.Fprintf(c.App.Writer, "no pool: %s\n", status.GetOff())
		return nil
	}
	rows := [][]string{{"IMAGE", "CPUS", "MEMORY", "DISK", "READY", "MIN", "MAX", "HITS", "MISSES", "FAILURES", "STATE"}}
	entries := [][]string{{"MICROVM", "IMAGE", "AGE", "CPU TIME", "MEMORY USED"}}
	now := time.Now()
	for _, p := range status.GetPools() {
		t := p.GetTemplate()
		rows = append(rows, []string{
			t.GetImage(), fmt.Sprint(t.GetCpus()), fmt.Sprintf("%d MiB", t.GetMemoryMib()), fmt.Sprintf("%d MiB", t.GetDiskMib()), fmt.Sprint(p.GetReady()),
			fmt.Sprint(p.GetMin()), fmt.Sprint(p.GetMax()), fmt.Sprint(p.GetHits()), fmt.Sprint(p.GetMisses()), fmt.Sprint(p.GetFailures()), oneLine(poolState(p)),
		})
		for _, e := range p.GetEntries() {
			entries = append(entries, []string{
				e.GetId(), t.GetImage(), age(now.Sub(e.GetCreatedAt().AsTime())), fmt.Sprintf("%.1fs", e.GetCpuSeconds()), size(int64(e.GetMemoryBytes())),
			})
		}
	}
	if err := printTable(c.App.Writer, rows); err != nil || len(entries) == 1 {
		return err
	}
	fmt.Fprintln(c.App.Writer)
	return printTable(c.App.Writer, entries)
}

// poolState says in a few words what a pool is doing.
func poolState(p *adminv1.Pool) string {
	switch {
	case p.GetFilling():
		return "starting one"
	case p.GetLastError() != "":
		return strings.TrimSpace(p.GetWaits() + ": " + p.GetLastError())
	case p.GetWaits() != "":
		return p.GetWaits()
	}
	return "ok"
}

func setPool(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	if !c.IsSet("min") || !c.IsSet("max") {
		return usageError(c, "give --min and --max")
	}
	for _, name := range []string{"cpus", "min", "max"} {
		if n := c.Int(name); n < 0 || n > math.MaxInt32 {
			return usageError(c, `invalid value "%d" for --%s: give a number from 0 to %d`, n, name, math.MaxInt32)
		}
	}
	a := admin(c)
	defer a.Close()
	t, err := a.SetPool(c.Context, &adminv1.SetPoolRequest{
		Template: &adminv1.PoolTemplate{
			Image: c.String("image"), Cpus: int32(c.Int("cpus")),
			MemoryMib: int32(c.Generic("memory").(*sandboxSize).mib), DiskMib: int32(c.Generic("disk").(*sandboxSize).mib),
		},
		Min: int32(c.Int("min")), Max: int32(c.Int("max")),
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(c.App.ErrWriter, "pool of %s with %d CPUs, %d MiB of memory and %d MiB of disk: from %d to %d microVMs\n",
		t.GetImage(), t.GetCpus(), t.GetMemoryMib(), t.GetDiskMib(), c.Int("min"), c.Int("max"))
	return nil
}
