package smtptest

import (
	"crypto/tls"
	"crypto/x509"
	"net/url"

	"github.com/smtprelay/smtprelay"
)

// Addr returns the "host:port" at which the relay listens. With InMemory nothing does; it is what a client is configured with.
// It panics before Start.
func (s *Server) Addr() string {
	if !s.started {
		panic("smtptest: Server was not started: it has no address yet") // an empty one would mean a real relay
	}
	return s.addr
}

// URL returns the relay's address and credentials in the form that [smtprelay.ParseURL] reads. It cannot say that the
// relay's certificate is to be trusted. It panics before Start.
func (s *Server) URL() string {
	u := url.URL{Scheme: "smtp", Host: s.Addr()}
	if s.implicitTLS {
		u.Scheme = "smtps"
	}
	if !s.NoAuth {
		u.User = url.UserPassword(s.Username, s.Password)
	}
	return u.String()
}

// Certificate returns the relay's own certificate, or nil without TLS. It is signed by itself.
func (s *Server) Certificate() *x509.Certificate { return s.cert }

// Roots returns a pool with the relay's own certificate, by which it can be verified, or nil without TLS.
func (s *Server) Roots() *x509.CertPool { return s.roots }

// Config returns a configuration for [smtprelay.New] in which the relay's address, TLS mode, roots and credentials are filled
// in, and Dial with InMemory. Each call returns a new one, which may be changed. It panics before Start.
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
		cfg.LocalName = "client.test" // a pipe has no address, and asking for the host's name would use the network
	}
	return cfg
}
