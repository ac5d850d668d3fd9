package tlscert

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"slices"
	"time"
)

// Status describes the certificates in use.
type Status struct {
	// Source is "files" or "acme".
	Source string
	// Names are the host names and addresses in the certificates.
	Names []string
	// NotAfter is when the first of the certificates expires. It is zero if there is no certificate yet.
	NotAfter time.Time
	// ClientCertificates reports whether clients must present a certificate.
	ClientCertificates bool
	// Warnings are problems that an administrator should fix.
	Warnings []string
}

// Status returns the status at the time now.
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
		warn("the changed TLS files cannot be used, so the previous ones are still in use: %v", live.reloadErr)
	}
	if live.keyMode&0o007 != 0 {
		warn("every user of this host can access the TLS key %s (%s): run 'chmod o= %[1]s'", s.opts.KeyFile, live.keyMode)
	}
	for _, c := range live.config.Certificates {
		if st.NotAfter.IsZero() || c.Leaf.NotAfter.Before(st.NotAfter) {
			st.NotAfter = c.Leaf.NotAfter
		}
		what := fmt.Sprintf("TLS certificate for %q", certNames(c.Leaf))
		if len(certNames(c.Leaf)) == 0 {
			what = "TLS certificate " + s.opts.CertFile
			warn("%s has no host name (subject alternative name), so clients refuse it: %s", what, remedy)
		}
		if problem := validityProblem(c.Leaf, now); problem != "" {
			warn("%s %s: %s", what, problem, remedy)
		}
	}
	for _, ca := range live.clientCAs {
		if problem := validityProblem(ca, now); problem != "" {
			warn("client CA %q in %s %s: replace it", ca.Subject, s.opts.ClientCAFile, problem)
		}
	}
	return st
}

// validityProblem says that a certificate is not valid yet, has expired or expires soon. If there is no problem, it returns
// "". A certificate expires soon if less than 14 days and less than a quarter of its lifetime remain. The quarter is for
// certificates with a lifetime of hours.
func validityProblem(c *x509.Certificate, now time.Time) string {
	remaining := c.NotAfter.Sub(now)
	expiry := c.NotAfter.UTC().Format(time.RFC3339)
	switch soon := min(14*24*time.Hour, c.NotAfter.Sub(c.NotBefore)/4); {
	case now.Before(c.NotBefore):
		return "is not valid before " + c.NotBefore.UTC().Format(time.RFC3339)
	case remaining < 0:
		return "expired at " + expiry
	case remaining >= soon:
		return ""
	case remaining >= 48*time.Hour:
		return fmt.Sprintf("expires at %s, in %d days", expiry, remaining/(24*time.Hour))
	case remaining >= 2*time.Hour:
		return fmt.Sprintf("expires at %s, in %d hours", expiry, remaining/time.Hour)
	case remaining >= time.Hour:
		return fmt.Sprintf("expires at %s, in 1 hour", expiry)
	default:
		return fmt.Sprintf("expires at %s, in less than 1 hour", expiry)
	}
}

// allNames returns the names in all certificates, each one once.
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

// certNames returns the host names and IP addresses in a certificate.
func certNames(c *x509.Certificate) []string {
	out := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		out = append(out, ip.String())
	}
	return out
}
