package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

var serverStatus = &cli.Command{
	Name:      "status",
	Usage:     "say how the server is, and whether it requires API keys",
	UsageText: "msb server status [--json]\nmsb server status [--namespace NS] [NAME...]",
	Description: "With a NAME or a namespace, it lists these sandboxes instead.\n\n" +
		"Exit codes: 0 running and ready; 3 not running; 4 running, but not ready (starting, recovering, draining\n" +
		"or degraded); 1 it cannot be told, for example without permission; 2 bad usage.",
	Flags:  []cli.Flag{listNamespaceFlag, jsonFlag},
	Action: status,
}

// statusTimeout is long for a call that never waits, so that a server that hangs is told as such.
const statusTimeout = 10 * time.Second

type statusInfo struct {
	State           string        `json:"state"`
	DegradedReasons []string      `json:"degraded_reasons,omitempty"`
	Version         string        `json:"version"`
	PID             int32         `json:"pid"`
	StartedAt       *time.Time    `json:"started_at"`
	ListenAddress   string        `json:"listen_address"`
	AuthRequired    bool          `json:"auth_required"`
	DevMode         bool          `json:"dev_mode"`
	InstanceID      string        `json:"instance_id"`
	SigningKey      signingInfo   `json:"signing_key"`
	Keys            keyCounts     `json:"keys"`
	Isolation       isolationInfo `json:"isolation"`
	Sandboxes       sandboxCounts `json:"sandboxes"`
	Recovery        recoveryInfo  `json:"recovery"`
	Containerd      string        `json:"containerd_version"`
	Kata            string        `json:"kata_version"`
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
	Accelerator string `json:"accelerator"`
	Reason      string `json:"reason"`
}

type sandboxCounts struct {
	Running int32 `json:"running"`
	Failed  int32 `json:"failed"`
}

type recoveryInfo struct {
	Adopted int32 `json:"adopted"`
	Lost    int32 `json:"lost"`
	Removed int32 `json:"removed"`
}

const ready = adminv1.GetStatusResponse_DAEMON_STATE_READY

func status(c *cli.Context) error {
	if err := flagsFirst(c); err != nil {
		return err
	}
	if c.NArg() > 0 || c.IsSet(listNamespaceFlag.Name) {
		return listSandboxes(c, c.Args().Slice())
	}
	a := admin(c)
	defer a.Close()
	ctx, cancel := context.WithTimeout(c.Context, statusTimeout)
	defer cancel()
	st, err := a.Status(ctx)
	if errors.Is(err, client.ErrNotRunning) {
		if c.Bool(jsonFlag.Name) {
			if err := printJSON(c, map[string]string{"state": "stopped"}); err != nil {
				return err
			}
			return cli.Exit("", exitNotRunning)
		}
		return cli.Exit(err.Error(), exitNotRunning)
	}
	if err != nil {
		return fmt.Errorf("ask msbd for its status: %w", err)
	}
	if c.Bool(jsonFlag.Name) {
		err = printJSON(c, statusInfo{
			State:           stateName(st),
			DegradedReasons: st.GetDegradedReasons(),
			Version:         st.GetVersion(),
			PID:             st.GetPid(),
			StartedAt:       jsonTime(st.GetStartedAt()),
			ListenAddress:   st.GetListenAddress(),
			AuthRequired:    st.GetAuthRequired(),
			DevMode:         st.GetDevMode(),
			InstanceID:      st.GetInstanceId(),
			SigningKey:      signingInfo{st.GetSigningKeyId(), jsonTime(st.GetSigningKeyCreatedAt())},
			Keys:            keyCounts{st.GetKeys().GetLive(), st.GetKeys().GetExpired(), st.GetKeys().GetRevoked()},
			Isolation:       isolationInfo{st.GetIsolation().GetAccelerator(), st.GetIsolation().GetReason()},
			Sandboxes:       sandboxCounts{st.GetSandboxesRunning(), st.GetSandboxesFailed()},
			Recovery:        recoveryInfo{st.GetRecovery().GetAdopted(), st.GetRecovery().GetLost(), st.GetRecovery().GetRemoved()},
			Containerd:      st.GetContainerdVersion(),
			Kata:            st.GetKataVersion(),
		})
	} else {
		err = table(c.App.Writer, describe(st, time.Now()))
	}
	if err == nil && st.GetState() != ready {
		return cli.Exit("", exitNotReady)
	}
	return err
}

// stateName is the state in one word: "ready".
func stateName(st *adminv1.GetStatusResponse) string {
	return strings.ToLower(strings.TrimPrefix(st.GetState().String(), "DAEMON_STATE_"))
}

// describe says it in plain words.
func describe(st *adminv1.GetStatusResponse, now time.Time) [][]string {
	state := "running, " + stateName(st)
	if reasons := st.GetDegradedReasons(); len(reasons) > 0 {
		state += ": " + strings.Join(reasons, "; ")
	}
	authentication := "API key required"
	if !st.GetAuthRequired() {
		authentication = "no API key required: whoever reaches the address can do everything"
	}
	devMode := "off"
	if st.GetDevMode() {
		devMode = "on"
	}
	isolation := st.GetIsolation().GetAccelerator()
	if reason := st.GetIsolation().GetReason(); reason != "" {
		isolation += " (" + reason + ")"
	}
	rows := [][]string{
		{"server", state},
		{"version", st.GetVersion()},
		{"process", fmt.Sprintf("pid %d, for %s", st.GetPid(), age(now.Sub(st.GetStartedAt().AsTime())))},
		{"address", "http://" + st.GetListenAddress()},
		{"authentication", authentication},
		{"dev mode", devMode},
		{"signing key", fmt.Sprintf("%s, %s old", st.GetSigningKeyId(), age(now.Sub(st.GetSigningKeyCreatedAt().AsTime())))},
		{"API keys", fmt.Sprintf("%d live, %d expired, %d revoked",
			st.GetKeys().GetLive(), st.GetKeys().GetExpired(), st.GetKeys().GetRevoked())},
		{"isolation", isolation},
		{"sandboxes", fmt.Sprintf("%d running, %d failed", st.GetSandboxesRunning(), st.GetSandboxesFailed())},
		{"at its start", fmt.Sprintf("adopted %d, lost %d, removed %d",
			st.GetRecovery().GetAdopted(), st.GetRecovery().GetLost(), st.GetRecovery().GetRemoved())},
	}
	for _, part := range [][]string{{"containerd", st.GetContainerdVersion()}, {"Kata", st.GetKataVersion()}} {
		if part[1] != "" {
			rows = append(rows, part)
		}
	}
	return rows
}
