package tlscert

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"time"
)

// Status says what handshakes use.
type Status struct {
	// Source is "files" or "acme".
	Source string
	// Names are the host names and addresses in the certificates.
	Names []string
	// NotAfter is when the first of the certificates ends; zero: there is none yet.
	NotAfter time.Time
	// ClientCertificates says whether clients must show one, too.
	ClientCertificates bool
	// Warnings are what an administrator should look at.
	Warnings []string
}

// Status is that of the moment now.
func (s *Source) Status(now time.Time) Status {
	live := s.live.Load()
	st := Status{Source: "files", Names: allNames(live.config.Certificates), ClientCertificates: len(live.clientCAs) > 0}
	remedy := "replace it"
	if s.acme != nil {
		st.Source = "acme"
		st.Warnings = s.acme.warnings()
		remedy = s.acme.renewalProblem()
	}
	warn := func(format string, a ...any) { st.Warnings = append(st.Warnings, fmt.Sprintf(format, a...)) }
	if live.reloadErr != nil {
		warn("the TLS files as they are now are not in use, the earlier ones are: %v", live.reloadErr)
	}
	if live.keyMode&0o007 != 0 {
		warn("TLS key %s is open to every user of this host (%s): chmod o= it", s.opts.KeyFile, live.keyMode)
	}
	for _, c := range live.config.Certificates {
		if st.NotAfter.IsZero() || c.Leaf.NotAfter.Before(st.NotAfter) {
			st.NotAfter = c.Leaf.NotAfter
		}
		what := fmt.Sprintf("TLS certificate of %q", certNames(c.Leaf))
		if len(certNames(c.Leaf)) == 0 {
			what = "TLS certificate " + s.opts.CertFile
			warn("%s names no host (subject alternative name), so clients refuse it: %s", what, remedy)
		}
		if age := validityProblem(c.Leaf, now); age != "" {
			warn("%s %s: %s", what, age, remedy)
		}
	}
	for _, ca := range live.clientCAs {
		if age := validityProblem(ca, now); age != "" {
			warn("client CA %q of %s %s: replace it", ca.Subject, s.opts.ClientCAFile, age)
		}
	}
	return st
}

// validityProblem says what is wrong with a certificate's age. Its end is near when less than 14 days and less
// than a quarter of its life are left: some are made to live for hours.
func validityProblem(c *x509.Certificate, now time.Time) string {
	left := c.NotAfter.Sub(now)
	end := c.NotAfter.UTC().Format(time.RFC3339)
	switch near := min(14*24*time.Hour, c.NotAfter.Sub(c.NotBefore)/4); {
	case now.Before(c.NotBefore):
		return "is not valid before " + c.NotBefore.UTC().Format(time.RFC3339)
	case left < 0:
		return "expired at " + end
	case left >= near:
		return ""
	case left >= 48*time.Hour:
		return fmt.Sprintf("expires at %s, in %d days", end, left/(24*time.Hour))
	default:
		return fmt.Sprintf("expires at %s, in %d hours", end, left/time.Hour)
	}
}

func allNames(certificates []tls.Certificate) (out []string) {
	for _, c := range certificates {
		for _, name := range certNames(c.Leaf) {
			if !slices.Contains(out, name) {
				out = append(out, name)
			}
		}
	}
	return out
}

func certNames(c *x509.Certificate) []string {
	out := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		out = append(out, ip.String())
	}
	return out
}
