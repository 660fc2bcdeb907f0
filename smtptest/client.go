package smtptest

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"testing"

	"github.com/smtprelay/smtprelay"
)

// Addr returns the "host:port" at which the relay listens, the first of its addresses. With InMemory nothing listens there, but a
// client needs an address in its configuration. Addr panics before Start.
func (s *Server) Addr() string {
	if !s.started {
		panic("smtptest: Server was not started and has no address") // an empty address would mean a real relay
	}
	return s.addrs[0]
}

// Addrs returns all addresses of the relay, each as "host:port" with the same port: see Server.Addresses. The caller may change
// the slice. It panics before Start.
func (s *Server) Addrs() []string {
	s.Addr()
	return slices.Clone(s.addrs)
}

// URL returns the relay's address and credentials in the form that [smtprelay.ParseURL] reads, for programs that have one setting
// for their relay. Without TLS the scheme is "smtp+insecure", else "smtp" or, after StartTLS, "smtps". With TLS the parameter
// "ca" is the path of a PEM file with the relay's own certificate, in the system's directory for temporary files; Close removes
// it. With InMemory nothing listens at the address. URL panics before Start, and if it cannot write the file.
func (s *Server) URL() string {
	u := url.URL{Scheme: "smtp+insecure", Host: s.Addr()}
	switch {
	case s.implicitTLS:
		u.Scheme = "smtps"
	case s.tlsConfig != nil:
		u.Scheme = "smtp"
	}
	if s.tlsConfig != nil {
		u.RawQuery = url.Values{"ca": {s.writeCA()}}.Encode()
	}
	if !s.NoAuth {
		u.User = url.UserPassword(s.Username, s.Password)
	}
	return u.String()
}

// writeCA returns the path of a file with the relay's own certificate. It writes the file once.
func (s *Server) writeCA() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.caFile != "" || s.closing {
		return s.caFile
	}
	f, err := os.CreateTemp("", "smtptest-*.pem")
	if err == nil {
		err = errors.Join(pem.Encode(f, &pem.Block{Type: "CERTIFICATE", Bytes: s.cert.Raw}), f.Close())
	}
	if err != nil {
		panic(fmt.Sprintf("smtptest: cannot write the certificate: %v", err))
	}
	s.caFile = f.Name()
	return s.caFile
}

// removeCA removes writeCA's file.
func (s *Server) removeCA() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.caFile != "" {
		os.Remove(s.caFile)
	}
}

// Certificate returns the relay's own, self-signed certificate, or nil without TLS and before Start.
func (s *Server) Certificate() *x509.Certificate { return s.cert }

// Roots returns a pool with the relay's own certificate, for verifying it, or nil without TLS and before Start.
func (s *Server) Roots() *x509.CertPool { return s.roots }

// Config returns a configuration for [smtprelay.New] with the relay's address, TLS mode, roots and credentials and, with
// InMemory, Dial. Everything else has its default. Each call returns a new one, which the caller may change. It panics before
// Start.
func (s *Server) Config() smtprelay.Config {
	cfg := smtprelay.Config{Addr: s.Addr(), TLS: smtprelay.TLSNone}
	switch {
	case s.implicitTLS:
		cfg.TLS = smtprelay.TLSImplicit
	case s.tlsConfig != nil:
		cfg.TLS = smtprelay.TLSStartTLS
	}
	if s.tlsConfig != nil {
		cfg.TLSConfig = &tls.Config{RootCAs: s.roots}
	}
	if !s.NoAuth {
		cfg.Username, cfg.Password = s.Username, s.Password
	}
	if s.InMemory {
		cfg.Dial = s.Dial
		cfg.LocalName = "client.test" // a pipe has no address, and looking up the host's name would use the network
	}
	return cfg
}

// Client returns a new client of the relay, made from Config after each option, in order, has changed it. It is closed when the
// test and its subtests have ended, before a relay that [New] returned. A relay that the test closes itself (defer relay.Close())
// closes before the client, which does no harm. Client fails the test if the configuration is invalid, and panics before Start.
func (s *Server) Client(tb testing.TB, options ...func(*smtprelay.Config)) *smtprelay.Client {
	tb.Helper()
	cfg := s.Config()
	for _, option := range options {
		option(&cfg)
	}
	client, err := smtprelay.New(cfg)
	if err != nil {
		tb.Fatalf("smtptest: %v", err)
	}
	tb.Cleanup(func() { client.Close() })
	return client
}
