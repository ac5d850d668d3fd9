package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

var serverStatus = &cli.Command{
	Name:      "status",
	Usage:     "show the status of the server",
	UsageText: "msb server status [options] [NAME...]",
	Description: "With the names of sandboxes or --namespace, msb lists these sandboxes instead. --watch cannot be combined with\n" +
		"either.\n\n" +
		"Exit codes: 0 running and ready, or --watch ended by Ctrl-C; 1 the status could not be determined, for example\n" +
		"without permission; 2 invalid usage; 3 not running; 4 running, but not ready (starting, recovering, draining or\n" +
		"degraded).",
	Flags: []cli.Flag{
		listNamespaceFlag,
		&cli.BoolFlag{
			Name: "watch", Aliases: []string{"w"},
			Usage: "continue until Ctrl-C, even while the server is not running; refresh a terminal every second, otherwise print each change",
		},
		jsonFlag,
	},
	Action: status,
}

// statusTimeout is long for a call that returns immediately, so that only a server that hangs exceeds it.
const statusTimeout = 10 * time.Second

type statusInfo struct {
	State           string        `json:"state"`
	DegradedReasons []string      `json:"degraded_reasons,omitempty"`
	Warnings        []string      `json:"warnings,omitempty"`
	Version         string        `json:"version"`
	PID             int32         `json:"pid"`
	StartedAt       *time.Time    `json:"started_at"`
	ListenAddress   string        `json:"listen_address"`
	TLS             *tlsInfo      `json:"tls"`
	AuthRequired    bool          `json:"auth_required"`
	DevMode         bool          `json:"dev_mode"`
	InstanceID      string        `json:"instance_id"`
	SigningKey      signingInfo   `json:"signing_key"`
	Keys            keyCounts     `json:"keys"`
	AuditEntries    uint64        `json:"audit_entries"`
	Isolation       isolationInfo `json:"isolation"`
	Sandboxes       sandboxCounts `json:"sandboxes"`
	Capacity        *capacityInfo `json:"capacity"` // null if the server is older than msb
	Pool            *poolTotal    `json:"pool"`     // null if the server is older than msb
	Recovery        recoveryInfo  `json:"recovery"`
	Containerd      string        `json:"containerd_version"`
	Kata            string        `json:"kata_version"`
}

type tlsInfo struct {
	Source             string     `json:"source"`
	Names              []string   `json:"names"`
	NotAfter           *time.Time `json:"not_after"`
	ClientCertificates bool       `json:"client_certificates"`
}

type signingInfo struct {
	ID        string     `json:"id"`
	CreatedAt *time.Time `json:"created_at"`
}

type keyCounts struct {
	Live    int32 `json:"live"`
	Expired int32 `json:"expired"`
	Revoked int32 `json:"revoked"`
}

type isolationInfo struct {
	Hypervisor       string   `json:"hypervisor"`
	HypervisorReason string   `json:"hypervisor_reason"`
	Accelerator      string   `json:"accelerator"`
	Reason           string   `json:"reason"` // why the accelerator was chosen
	Advice           []string `json:"advice"`
}

type sandboxCounts struct {
	Running int32 `json:"running"`
	Failed  int32 `json:"failed"`
}

type capacityInfo struct {
	Sandboxes    int32 `json:"sandboxes"`
	MaxSandboxes int32 `json:"max_sandboxes"`
	MemoryMiB    int64 `json:"memory_mib"`
	MaxMemoryMiB int64 `json:"max_memory_mib"` // 0 if only the memory of the host limits the sandboxes
	// What is left for starts; null if it is not known, or if the server is older than msb.
	AvailableMemoryMiB *int64 `json:"available_memory_mib"`
	FreeDiskMiB        *int64 `json:"free_disk_mib"`
	StartsInProgress   int32  `json:"starts_in_progress"`
	StartsWaiting      int32  `json:"starts_waiting"`
}

// poolTotal describes all pools. Only Off is set if there is none.
type poolTotal struct {
	Off         string     `json:"off,omitempty"` // why there is none
	Ready       int32      `json:"ready"`
	Target      int32      `json:"target"`
	Hits        uint64     `json:"hits"`
	Misses      uint64     `json:"misses"`
	Oldest      *time.Time `json:"oldest"` // null if there is none
	CPUSeconds  float64    `json:"cpu_seconds"`
	MemoryBytes uint64     `json:"memory_bytes"`
}

type recoveryInfo struct {
	Adopted int32 `json:"adopted"`
	Lost    int32 `json:"lost"`
	Removed int32 `json:"removed"`
}

// noStatus is the JSON document that replaces statusInfo if the server does not answer.
type noStatus struct {
	State string `json:"state"` // "stopped" or "unknown"
	Error string `json:"error"` // the reason and what to do
}

const (
	ready    = adminv1.GetStatusResponse_DAEMON_STATE_READY
	degraded = adminv1.GetStatusResponse_DAEMON_STATE_DEGRADED
)

func status(c *cli.Context) error {
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	if c.NArg() > 0 || c.IsSet(listNamespaceFlag.Name) {
		if c.Bool("watch") {
			return usageError(c, "--watch shows the server and cannot be combined with NAME or --namespace")
		}
		return listSandboxes(c, c.Args().Slice())
	}
	if c.Bool("watch") {
		return watchStatus(c)
	}
	st, err := askStatus(c)
	stopped := errors.Is(err, client.ErrNotRunning)
	switch {
	case stopped && c.Bool(jsonFlag.Name):
		if err := printJSON(c, statusDocument(nil, err)); err != nil {
			return err
		}
		return cli.Exit("", exitNotRunning)
	case stopped:
		return cli.Exit(err.Error(), exitNotRunning)
	case err != nil:
		return fmt.Errorf("get the status of msbd: %w", err)
	case c.Bool(jsonFlag.Name):
		err = printJSON(c, statusDocument(st, nil))
	default:
		err = printStatus(c, st)
	}
	if err == nil && st.GetState() != ready {
		return cli.Exit("", exitNotReady)
	}
	return err
}

// askStatus gets the server's status. It uses a new connection for each call, because gRPC waits longer and longer before it
// reconnects.
func askStatus(c *cli.Context) (*adminv1.GetStatusResponse, error) {
	a := admin(c)
	defer a.Close()
	ctx, cancel := context.WithTimeout(c.Context, statusTimeout)
	defer cancel()
	return a.Status(ctx)
}

// statusDocument returns the JSON document for a status, or for the error if there is no status.
func statusDocument(st *adminv1.GetStatusResponse, err error) any {
	switch {
	case errors.Is(err, client.ErrNotRunning):
		return noStatus{"stopped", err.Error()}
	case err != nil:
		return noStatus{"unknown", err.Error()}
	}
	info := statusInfo{
		State:           stateName(st),
		DegradedReasons: st.GetDegradedReasons(),
		Warnings:        st.GetWarnings(),
		Version:         st.GetVersion(),
		PID:             st.GetPid(),
		StartedAt:       jsonTime(st.GetStartedAt()),
		ListenAddress:   st.GetListenAddress(),
		AuthRequired:    st.GetAuthRequired(),
		DevMode:         st.GetDevMode(),
		InstanceID:      st.GetInstanceId(),
		SigningKey:      signingInfo{st.GetSigningKeyId(), jsonTime(st.GetSigningKeyCreatedAt())},
		Keys:            keyCounts{st.GetKeys().GetLive(), st.GetKeys().GetExpired(), st.GetKeys().GetRevoked()},
		AuditEntries:    st.GetAuditEntries(),
		Isolation:       describeIsolation(st.GetIsolation()),
		Sandboxes:       sandboxCounts{st.GetSandboxesRunning(), st.GetSandboxesFailed()},
		Recovery:        recoveryInfo{st.GetRecovery().GetAdopted(), st.GetRecovery().GetLost(), st.GetRecovery().GetRemoved()},
		Containerd:      st.GetContainerdVersion(),
		Kata:            st.GetKataVersion(),
	}
	if c := st.GetCapacity(); c != nil {
		info.Capacity = &capacityInfo{
			Sandboxes: c.GetSandboxes(), MaxSandboxes: c.GetMaxSandboxes(), MemoryMiB: c.GetMemoryMib(), MaxMemoryMiB: c.GetMaxMemoryMib(),
			AvailableMemoryMiB: c.AvailableMemoryMib, FreeDiskMiB: c.FreeDiskMib,
			StartsInProgress: c.GetStartsInProgress(), StartsWaiting: c.GetStartsWaiting(),
		}
	}
	if p := st.GetPool(); p != nil {
		info.Pool = &poolTotal{p.GetOff(), p.GetReady(), p.GetTarget(), p.GetHits(), p.GetMisses(), jsonTime(p.GetOldest()), p.GetCpuSeconds(), p.GetMemoryBytes()}
	}
	if t := st.GetTls(); t != nil {
		info.TLS = &tlsInfo{t.GetSource(), append([]string{}, t.GetNames()...), jsonTime(t.GetNotAfter()), t.GetClientCertificates()}
	}
	return info
}

func describeIsolation(i *adminv1.Isolation) isolationInfo {
	return isolationInfo{i.GetHypervisor(), i.GetHypervisorReason(), i.GetAccelerator(), i.GetReason(), append([]string{}, i.GetAdvice()...)}
}

// stateName returns the state in one word, such as "ready".
func stateName(st *adminv1.GetStatusResponse) string {
	return strings.ToLower(strings.TrimPrefix(st.GetState().String(), "DAEMON_STATE_"))
}

// gatewayURL returns the URL of the server for clients.
func gatewayURL(st *adminv1.GetStatusResponse) string {
	if st.GetTls() != nil {
		return "https://" + st.GetListenAddress()
	}
	return "http://" + st.GetListenAddress()
}

func printStatus(c *cli.Context, st *adminv1.GetStatusResponse) error {
	rows := describe(st, time.Now())
	return printColored(c.App.Writer, rows, func(row int) color {
		switch {
		case rows[row][0] == "warning":
			return yellow
		case row > 0:
			return plain
		case st.GetState() == ready:
			return green
		case st.GetState() == degraded:
			return red
		default:
			return yellow
		}
	})
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// describe returns the rows of a table with the status. The first row is the state.
func describe(st *adminv1.GetStatusResponse, now time.Time) [][]string {
	state := "running, " + stateName(st)
	if reasons := st.GetDegradedReasons(); len(reasons) > 0 {
		state += ": " + strings.Join(reasons, "; ")
	}
	rows := [][]string{{"server", state}}
	for _, warning := range st.GetWarnings() {
		rows = append(rows, []string{"warning", warning})
	}
	authentication := "API key required"
	if !st.GetAuthRequired() {
		authentication = "no API key required: anyone who can connect to the address can do everything"
	}
	rows = slices.Concat(rows, [][]string{
		{"version", st.GetVersion()},
		{"process", fmt.Sprintf("pid %d, running for %s", st.GetPid(), age(now.Sub(st.GetStartedAt().AsTime())))},
		{"address", gatewayURL(st)},
		{"TLS", describeTLS(st.GetTls(), now)},
		{"authentication", authentication},
		{"dev mode", onOff(st.GetDevMode())},
		{"signing key", fmt.Sprintf("%s, %s old", st.GetSigningKeyId(), age(now.Sub(st.GetSigningKeyCreatedAt().AsTime())))},
		{"API keys", fmt.Sprintf("%d live, %d expired, %d revoked",
			st.GetKeys().GetLive(), st.GetKeys().GetExpired(), st.GetKeys().GetRevoked())},
		{"audit log", plural(st.GetAuditEntries(), "entry", "entries")},
	}, isolationRows(describeIsolation(st.GetIsolation())), [][]string{
		{"sandboxes", fmt.Sprintf("%d running, %d failed", st.GetSandboxesRunning(), st.GetSandboxesFailed())},
	}, capacityRows(st.GetCapacity()), poolRows(st.GetPool(), now), [][]string{
		{"recovery", fmt.Sprintf("%d adopted, %d lost, %d removed when the server started",
			st.GetRecovery().GetAdopted(), st.GetRecovery().GetLost(), st.GetRecovery().GetRemoved())},
	})
	for _, part := range [][]string{{"containerd", st.GetContainerdVersion()}, {"Kata", st.GetKataVersion()}} {
		if part[1] != "" {
			rows = append(rows, part)
		}
	}
	return rows
}

func capacityRows(c *adminv1.Capacity) [][]string {
	if c == nil { // the server is older than msb
		return nil
	}
	memory := fmt.Sprintf("%d MiB of memory", c.GetMemoryMib())
	if most := c.GetMaxMemoryMib(); most > 0 {
		memory = fmt.Sprintf("%d of %d MiB of memory", c.GetMemoryMib(), most)
	}
	rows := [][]string{{"capacity", fmt.Sprintf("%d of %d sandboxes, %s", c.GetSandboxes(), c.GetMaxSandboxes(), memory)}}
	var room []string
	if c.AvailableMemoryMib != nil {
		room = append(room, fmt.Sprintf("%d MiB of memory", c.GetAvailableMemoryMib()))
	}
	if c.FreeDiskMib != nil {
		room = append(room, fmt.Sprintf("%d MiB of disk", c.GetFreeDiskMib()))
	}
	if len(room) > 0 { // it is empty if the server is older than msb
		rows = append(rows,
			[]string{"available", strings.Join(room, ", ") + " for sandboxes"},
			[]string{"starts", fmt.Sprintf("%d in progress, %d waiting", c.GetStartsInProgress(), c.GetStartsWaiting())})
	}
	return rows
}

func poolRows(p *adminv1.PoolSummary, now time.Time) [][]string {
	switch {
	case p == nil: // the server is older than msb
		return nil
	case p.GetOff() != "":
		return [][]string{{"warm pool", withReason("off", p.GetOff())}}
	}
	text := fmt.Sprintf("%d of %d ready, %d hits, %d misses", p.GetReady(), p.GetTarget(), p.GetHits(), p.GetMisses())
	if p.GetOldest() != nil {
		text += fmt.Sprintf(", %s of memory, the oldest %s old", size(int64(p.GetMemoryBytes())), age(now.Sub(p.GetOldest().AsTime())))
	}
	return [][]string{{"warm pool", text}}
}

func isolationRows(i isolationInfo) [][]string {
	rows := [][]string{{"isolation", withReason(i.Accelerator, i.Reason)}}
	if i.Hypervisor != "" { // empty if the server is older than msb
		rows = append(rows, []string{"hypervisor", withReason(i.Hypervisor, i.HypervisorReason)})
	}
	for _, advice := range i.Advice {
		rows = append(rows, []string{"advice", advice})
	}
	return rows
}

// withReason formats a choice with its reason, if there is one.
func withReason(what, reason string) string {
	if reason == "" {
		return what
	}
	return what + " (" + reason + ")"
}

func describeTLS(t *adminv1.TLS, now time.Time) string {
	if t == nil {
		return "off"
	}
	text := "no certificate yet"
	if end := t.GetNotAfter(); end != nil {
		remaining := "expired"
		if d := end.AsTime().Sub(now); d > 0 {
			remaining = "in " + age(d)
		}
		text = fmt.Sprintf("certificate for %s until %s, %s", strings.Join(t.GetNames(), ", "), localTime(end), remaining)
	}
	if t.GetClientCertificates() {
		text += "; client certificates required"
	}
	return text + " (" + t.GetSource() + ")"
}
