package smtptest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"time"
)

// canStartTLS reports whether STARTTLS is offered now.
func (c *conn) canStartTLS() bool { return c.s.tlsConfig != nil && c.tls == nil }

// startTLS executes STARTTLS. go-smtp does not see it: it gets one plaintext connection before TLS and another after.
func (c *conn) startTLS(line string) ending {
	b := c.meet(Event{Step: StartTLS, Line: line})
	if !c.canStartTLS() {
		return c.answer(b, func() string { return "502 5.5.1 STARTTLS not offered" })
	}
	end := c.answer(b, func() string { return "220 Begin TLS negotiation now" })
	if end != goOn || b.refuses() {
		return end
	}
	c.br.Discard(c.br.Buffered()) // sent in plaintext: must be ignored
	c.bw.Flush()
	if end := c.handshake(); end != goOn {
		return end
	}
	c.env, c.authed = envelope{}, false
	c.back.Close()
	if !c.dialBackend() {
		return lost
	}
	return goOn
}

func (c *conn) handshake() ending {
	c.is("in the TLS handshake")
	if b := c.meet(Event{Step: TLSHandshake}); b.reply != "" || b.end != goOn {
		if b.reply != "" {
			c.say(b.reply)
		}
		return max(b.end, hangUp)
	}
	t := tls.Server(&records{wire: c.wire}, c.s.tlsConfig)
	if err := t.Handshake(); err != nil {
		c.note("TLS handshake: ", err.Error())
		return lost
	}
	st := t.ConnectionState()
	if st.Version >= tls.VersionTLS13 {
		c.wire.answered = false // a client does not wait for a session ticket
	}
	c.tls, c.rw = t, t
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.stats.TLS, c.stats.TLSResumed = true, st.DidResume
	return goOn
}

// makeTLS creates the relay's own certificate and its TLS configuration.
func (s *Server) makeTLS() {
	s.tlsConfig = s.TLS.Clone()
	if s.tlsConfig == nil {
		s.tlsConfig = &tls.Config{}
	}
	var err error
	if len(s.tlsConfig.Certificates) == 0 {
		s.tlsConfig.Certificates = make([]tls.Certificate, 1)
		s.tlsConfig.Certificates[0], err = newCertificate(s.CertNames, s.CertNotAfter)
	}
	if err == nil {
		s.cert, err = x509.ParseCertificate(s.tlsConfig.Certificates[0].Certificate[0])
	}
	if err != nil {
		panic(fmt.Sprintf("smtptest: no certificate: %v", err))
	}
	s.roots = x509.NewCertPool()
	s.roots.AddCert(s.cert)
}

// newCertificate creates a self-signed certificate.
func newCertificate(names []string, notAfter time.Time) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return tls.Certificate{}, err
	}
	if notAfter.IsZero() {
		notAfter = time.Date(2084, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{Organization: []string{"smtptest"}},
		// Long ago: the clock of a synctest bubble starts in 2000.
		NotBefore:             time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC),
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
