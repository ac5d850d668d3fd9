package tlscert

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// pebble is a process of Pebble, the ACME server that Let's Encrypt provides for tests. It validates domains like a real
// server: it resolves the name with the DNS server of the test and connects to the gateway for the tls-alpn-01 challenge.
type pebble struct {
	// directory is its directory URL.
	directory string
	// serverCA is a file with the CA of the server's own certificate.
	serverCA string
	// roots has the root of the certificates that it issues.
	roots *x509.CertPool
	// stop stops the process. It is also called when the test ends.
	stop func()
}

// startPebble starts a Pebble for which all hosts resolve to the address of gateway. The certificates that it issues are
// valid for lifetime.
func startPebble(t *testing.T, gateway net.Addr, lifetime time.Duration, hosts ...string) pebble {
	t.Helper()
	program := os.Getenv("MSB_PEBBLE")
	if program == "" {
		program = filepath.Join(moduleRoot(t), "bin", "tools", "pebble")
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("the ACME server for tests is missing; run 'make bin/tools/pebble': %v", err)
	}
	dir := t.TempDir()
	writeFile := func(name string, data []byte) (path string) {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	ca := newAuthority(t, "pebble's own CA")
	ip := pebbleIP()
	pair := ca.issue(t, func(c *x509.Certificate) { c.IPAddresses = []net.IP{ip} })
	address, management := freeAddresses(t, ip)
	config, err := json.Marshal(map[string]any{"pebble": map[string]any{
		"listenAddress":           address,
		"managementListenAddress": management,
		"certificate":             writeFile("cert.pem", pair.cert),
		"privateKey":              writeFile("key.pem", pair.key),
		"tlsPort":                 gateway.(*net.TCPAddr).Port,
		"retryAfter":              map[string]int{"authz": 1, "order": 1},
		"keyAlgorithm":            "ecdsa",
		"profiles":                map[string]any{"default": map[string]any{"validityPeriod": int(lifetime.Seconds())}},
	}})
	if err != nil {
		t.Fatal(err)
	}

	var output bytes.Buffer
	cmd := exec.Command(program, "-config", writeFile("config.json", config), "-dnsserver", serveDNS(t, hosts))
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.Env = append(os.Environ(), "PEBBLE_VA_NOSLEEP=1", "PEBBLE_AUTHZREUSE=0")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); cmd.Wait() }()
	p := pebble{
		directory: "https://" + address + "/dir",
		serverCA:  writeFile("ca.pem", ca.pem()),
		roots:     x509.NewCertPool(),
		stop:      func() { cmd.Process.Kill(); <-ended },
	}
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("pebble's log:\n%s", &output)
		}
	})

	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ca.pool()}}}
	defer client.CloseIdleConnections()
	fetch := func(url string) (body []byte, err error) {
		resp, err := client.Get(url)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		return io.ReadAll(resp.Body)
	}
	eventually(t, "pebble to respond", func() bool {
		select {
		case <-ended:
			t.Fatal("pebble exited")
		default:
		}
		root, err := fetch("https://" + management + "/roots/0")
		if err != nil {
			return false
		}
		if !p.roots.AppendCertsFromPEM(root) {
			t.Fatalf("pebble's root certificate is %q, want PEM", root)
		}
		_, err = fetch(p.directory)
		return err == nil
	})
	return p
}

func moduleRoot(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	for ; err == nil; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	t.Fatalf("find go.mod: %v", err)
	return ""
}

var pebbles atomic.Uint32

// pebbleIP returns a loopback address for a single Pebble process. Pebble does not report which ports it listens on, so
// the test chooses free ports, which must still be free when Pebble starts. On an address of its own, no other process
// and no outgoing connection takes them. The address depends on the pid, so that tests that run at the same time in other
// clones use other addresses.
func pebbleIP() net.IP {
	pid := os.Getpid()
	return net.IPv4(127, 128|byte(pid>>8), byte(pid), byte(pebbles.Add(1)))
}

// freeAddresses returns two addresses of ip with free ports.
func freeAddresses(t *testing.T, ip net.IP) (string, string) {
	t.Helper()
	var ln [2]net.Listener
	for i := range ln {
		var err error
		if ln[i], err = net.Listen("tcp", net.JoinHostPort(ip.String(), "0")); err != nil {
			t.Fatal(err)
		}
		defer ln[i].Close()
	}
	return ln[0].Addr().String(), ln[1].Addr().String()
}

// serveDNS starts a DNS server that resolves hosts to 127.0.0.1 and no other name. It uses TCP, as Pebble does.
func serveDNS(t *testing.T, hosts []string) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for answerDNS(conn, hosts) == nil {
				}
			}()
		}
	}()
	return ln.Addr().String()
}

// answerDNS reads one query from conn and answers it.
func answerDNS(conn io.ReadWriter, hosts []string) error {
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return err
	}
	query := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(conn, query); err != nil {
		return err
	}
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return err
	}
	if len(m.Questions) != 1 {
		return fmt.Errorf("query has %d questions, want 1", len(m.Questions))
	}
	question := m.Questions[0]
	answer := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: m.ID, Response: true, RCode: dnsmessage.RCodeNameError},
		Questions: m.Questions,
	}
	if slices.ContainsFunc(hosts, func(host string) bool { return question.Name.String() == host+"." }) {
		answer.RCode = dnsmessage.RCodeSuccess
		if question.Type == dnsmessage.TypeA {
			answer.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: question.Name, Class: dnsmessage.ClassINET},
				Body:   &dnsmessage.AResource{A: [4]byte{127, 0, 0, 1}},
			}}
		}
	}
	packed, err := answer.AppendPack(length[:])
	if err != nil {
		return err
	}
	binary.BigEndian.PutUint16(packed, uint16(len(packed)-len(length)))
	_, err = conn.Write(packed)
	return err
}
