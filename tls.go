package smtprelay

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/smtprelay/smtprelay/internal/printable"
)

// TLSMode says how a connection is protected.
type TLSMode int

const (
	// TLSByPort: TLS from the first byte on ports 465 and 2465, STARTTLS required on every other port. Only a relay on a loopback
	// address may lack STARTTLS: the connection is then in the clear.
	TLSByPort TLSMode = iota
	// TLSImplicit: TLS from the first byte (RFC 8314).
	TLSImplicit
	// TLSStartTLS: STARTTLS required (RFC 3207).
	TLSStartTLS
	// TLSOpportunistic: STARTTLS where the relay offers it, else mail in the clear; TLS from the first byte on ports 465 and 2465. A
	// handshake that fails and a certificate that does not verify are errors. An attacker between here and the relay can hide the
	// offer and read the mail. For credentials see Config.AllowInsecureAuth.
	TLSOpportunistic
	// TLSNone: no TLS, mail in the clear, for a network that you trust. For credentials see Config.AllowInsecureAuth.
	TLSNone
)

// String returns "by port", "implicit", "starttls", "opportunistic" or "none".
func (m TLSMode) String() string {
	switch m {
	case TLSByPort:
		return "by port"
	case TLSImplicit:
		return "implicit"
	case TLSStartTLS:
		return "starttls"
	case TLSOpportunistic:
		return "opportunistic"
	case TLSNone:
		return "none"
	}
	return fmt.Sprintf("TLSMode(%d)", int(m))
}

// implicit reports whether TLS begins with the first byte.
func (c *settings) implicit() bool {
	return c.TLS == TLSImplicit || (c.TLS == TLSByPort || c.TLS == TLSOpportunistic) && (c.port == "465" || c.port == "2465")
}

// clear reports what may cross nc without TLS: mail, if the relay does not offer STARTTLS, and credentials.
func (c *settings) clear(nc net.Conn) (mail, credentials bool) {
	local := isLoopback(c.host) && !leavesMachine(nc.RemoteAddr())
	switch c.TLS {
	case TLSByPort:
		mail = local
	case TLSOpportunistic, TLSNone:
		mail = true
	}
	return mail, local || c.AllowInsecureAuth
}

// isLoopback reports whether host names this machine.
func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback() || strings.EqualFold(host, "localhost")
}

// leavesMachine reports whether remote is the address of another machine; a pipe and a Unix socket have no such address. The
// caller must check the host too: a connection through a proxy may have the proxy's address.
func leavesMachine(remote net.Addr) bool {
	if remote == nil {
		return false
	}
	addr, err := netip.ParseAddrPort(remote.String())
	return err == nil && !addr.Addr().Unmap().IsLoopback()
}

// tlsConfig completes the user's configuration for the relay's host.
func tlsConfig(user *tls.Config, host string) *tls.Config {
	c := user.Clone()
	if c == nil {
		c = &tls.Config{}
	}
	if c.ServerName == "" {
		c.ServerName = host
	}
	if c.MinVersion == 0 {
		c.MinVersion = tls.VersionTLS12
	}
	if c.ClientSessionCache == nil {
		c.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	}
	// Send a message in one record and one system call. Small records would only help the time to first byte, which does not
	// matter here.
	c.DynamicRecordSizingDisabled = true
	return c
}

// verifies reports whether the relay's certificate is verified, by crypto/tls or by the user's own functions.
func (c *settings) verifies() bool {
	return !c.tls.InsecureSkipVerify || c.tls.VerifyPeerCertificate != nil || c.tls.VerifyConnection != nil
}

// explainTLS adds to e, the error of a failed handshake, what to do about it.
func (c *settings) explainTLS(e *Error) {
	if code := clearReply(e.Err); code >= 400 {
		// Exim refuses a connection above its limit with a reply in the clear, even on a port with implicit TLS.
		e.Op, e.Reply, e.Err = OpGreeting, Reply{Code: code}, errors.New("the reply came in the clear, in place of TLS")
	} else if hint := c.tlsHint(e.Err); hint != "" {
		if _, ok := errors.AsType[*tls.CertificateVerificationError](e.Err); ok && isLoopback(c.host) && !c.implicit() {
			hint += "; for a relay on this machine, TLSNone turns TLS off"
		}
		e.Err = &hintedError{e.Err, hint}
		e.permanent = true
	}
}

// hintedError is a TLS error with advice. Its text may contain names from the peer's certificate, which is not trusted.
type hintedError struct {
	err  error
	hint string
}

func (e *hintedError) Error() string {
	return printable.Quote(e.err.Error(), printable.MostWords) + "; " + e.hint
}

func (e *hintedError) Unwrap() error { return e.err }

// explainClearAuth returns the error, with advice, for credentials that would cross the connection in the clear.
func (c *settings) explainClearAuth() error {
	cure := "use a mode of TLS that requires it"
	if c.TLS == TLSOpportunistic {
		cure = "the relay does not offer STARTTLS, or an attacker on the way hides it"
	}
	return fmt.Errorf("the credentials would cross the network in the clear, so they were not sent; %s, or set Config.AllowInsecureAuth", cure)
}

// silenceHint is the advice if the relay sends no greeting on a connection without implicit TLS.
func (c *settings) silenceHint() string {
	return fmt.Sprintf("if the relay speaks TLS from the first byte on port %s, use TLSImplicit, or smtps:// in a URL", c.port)
}

// clearReply returns the code of an SMTP reply in the clear that arrived in place of a TLS record; 0 if there is none.
func clearReply(err error) int {
	var header tls.RecordHeaderError
	if !errors.As(err, &header) {
		return 0
	}
	code, parseErr := strconv.Atoi(string(header.RecordHeader[:3]))
	if sep := header.RecordHeader[3]; parseErr != nil || sep != ' ' && sep != '-' {
		return 0
	}
	return code
}

// tlsHint returns what to change if err is permanent; "" otherwise.
func (c *settings) tlsHint(err error) string {
	var (
		header  tls.RecordHeaderError
		name    x509.HostnameError
		unknown x509.UnknownAuthorityError
		invalid x509.CertificateInvalidError
		verify  *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &header) && c.implicit() && clearReply(err) == 0:
		return noSMTP
	case errors.As(err, &header) && c.implicit():
		return fmt.Sprintf("the relay does not speak TLS from the first byte on port %s; use TLSStartTLS", c.port)
	case errors.As(err, &name):
		return c.nameHint(name.Certificate)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Sprintf("the relay's certificate is expired or not yet valid at %s; check the clock, or ask the relay's operator", time.Now().Format(time.RFC3339))
	case errors.As(err, &unknown):
		return c.issuerHint(unknown.Cert)
	case errors.As(err, &verify):
		return "the relay's certificate is not valid"
	}
	return alertHint(err)
}

// nameHint returns the advice if cert is for another name. The server that presented cert may not be the relay.
func (c *settings) nameHint(cert *x509.Certificate) string {
	if cert != nil && len(cert.DNSNames) == 0 && len(cert.IPAddresses) == 0 && len(cert.EmailAddresses) == 0 && len(cert.URIs) == 0 {
		return "the certificate has a common name and no subject alternative name, so that no TLSConfig.ServerName can match it; the relay needs a new certificate (RFC 9525, 6.3)"
	}
	return fmt.Sprintf("the certificate is not for %q; check the host in Addr; if that is right, somebody else may be answering in the relay's place; "+
		"set TLSConfig.ServerName only to a name that its operator tells you", c.tls.ServerName)
}

// issuerHint returns the advice if cert is not signed by a trusted authority.
func (c *settings) issuerHint(cert *x509.Certificate) string {
	whom := "its authority"
	hint := "the certificate is not signed by an authority that this machine trusts"
	switch {
	case cert == nil:
	case bytes.Equal(cert.RawIssuer, cert.RawSubject):
		whom = "it"
		hint = fmt.Sprintf("the certificate is self-signed, by %s", quoted(cert.Issuer.String()))
	default:
		hint = fmt.Sprintf("the certificate is issued by %s, whom this machine does not trust", quoted(cert.Issuer.String()))
	}
	hint += "; if it is the relay's, put " + whom + " into TLSConfig.RootCAs; if not, somebody else is answering in the relay's place"
	return hint
}

// alertText returns the text of the TLS alert that the relay has sent (RFC 8446, 6); "" if err is not an alert, whose type is
// not exported.
func alertText(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" && op.Err != nil {
		return op.Err.Error()
	}
	return ""
}

// alerts lists the permanent TLS alerts with advice.
var alerts = []struct{ text, hint string }{
	{"protocol version", noVersion},
	{"handshake failure", "the relay and this program have no version or cipher suite in common, or the relay wants a client certificate (TLSConfig.Certificates)"}, // 40
	{"insufficient security", "the relay wants a stronger cipher suite than this program offers; see TLSConfig.CipherSuites and MaxVersion"},                        // 71
	{"certificate required", "the relay wants a client certificate (TLSConfig.Certificates)"},                                                                       // 116
	{"bad certificate", refusedCertificate},         // 42
	{"unsupported certificate", refusedCertificate}, // 43
	{"revoked certificate", refusedCertificate},     // 44
	{"expired certificate", refusedCertificate},     // 45
	{"unknown certificate", refusedCertificate},     // 46, 48
	{"access denied", refusedCertificate},           // 49
	{"unrecognized name", "the relay does not know the name that it was called by; check the host in Addr, or TLSConfig.ServerName"}, // 112
	{"no application protocol", "the relay wants another protocol (ALPN); check the port, and TLSConfig.NextProtos"},                 // 120
}

const (
	noVersion          = "the relay and this program have no version of TLS in common; TLSConfig.MinVersion is TLS 1.2 if it is not set"
	refusedCertificate = "the relay wants a client certificate, or does not accept the one it was given (TLSConfig.Certificates)"
)

// alertHint returns what to change if err is a TLS alert from the relay, or the same error detected on our side; "" otherwise.
func alertHint(err error) string {
	text := alertText(err)
	for _, a := range alerts {
		if strings.Contains(text, a.text) {
			return a.hint
		}
	}
	if strings.Contains(err.Error(), "protocol version") {
		return noVersion
	}
	return ""
}
