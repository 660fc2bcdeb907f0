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

// makeTLS makes the relay's own certificate and its TLS configuration.
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

// newCertificate makes a certificate that signs itself.
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
		// Long ago: the clock of a synctest bubble stands at 2000.
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
