// How the driver starts the relay's process, and asks it for listeners and counts.

package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"time"
)

// The relay has its own process, so that a peer's process shows only the cost of the client. It reads commands as lines of JSON
// on its standard input, and answers each with one on its standard output.

type relayRequest struct {
	Open  *relayConfig `json:"open,omitempty"`
	Close string       `json:"close,omitempty"` // an address that Open has returned
}

type relayAnswer struct {
	Roots  string       `json:"roots,omitempty"` // PEM; only in the first line, which answers no command
	Addr   string       `json:"addr,omitempty"`
	Report *relayReport `json:"report,omitempty"`
	Err    string       `json:"err,omitempty"`
}

// relayMain is the relay's process: it serves until its standard input ends.
func relayMain(in io.Reader, out io.Writer) error {
	cert, roots, err := selfSigned()
	if err != nil {
		return err
	}
	enc := json.NewEncoder(out)
	if err := enc.Encode(relayAnswer{Roots: roots}); err != nil {
		return err
	}
	type listener struct {
		relay *relay
		used  usage
	}
	listeners := make(map[string]listener)
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var req relayRequest
		var ans relayAnswer
		if err := json.Unmarshal(lines.Bytes(), &req); err != nil {
			return err
		}
		switch {
		case req.Open != nil:
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			r := newRelay(*req.Open, ln, cert)
			go r.serve(func() sleeper { return newAlarm() }) // until finish
			ans.Addr = ln.Addr().String()
			listeners[ans.Addr] = listener{r, used()}
		case req.Close != "":
			l, ok := listeners[req.Close]
			if !ok {
				ans.Err = "no listener " + req.Close
				break
			}
			delete(listeners, req.Close)
			cpu := used().cpu - l.used.cpu
			rep := l.relay.finish()
			rep.CPU = cpu
			ans.Report = &rep
		}
		if err := enc.Encode(ans); err != nil {
			return err
		}
	}
	return lines.Err()
}

// relayProcess is the driver's end of the relay's process.
type relayProcess struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *json.Decoder
	roots string // name of a PEM file
}

func startRelay() (*relayProcess, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &relayProcess{cmd: exec.Command(self, "relay")}
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = json.NewDecoder(out)
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	var hello relayAnswer
	if err := p.out.Decode(&hello); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp("", "bench-roots-*.pem")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	p.roots = f.Name()
	_, err = f.WriteString(hello.Roots)
	return p, err
}

func (p *relayProcess) ask(req relayRequest) (relayAnswer, error) {
	var ans relayAnswer
	if err := json.NewEncoder(p.in).Encode(req); err != nil {
		return ans, err
	}
	if err := p.out.Decode(&ans); err != nil {
		return ans, err
	}
	if ans.Err != "" {
		return ans, fmt.Errorf("relay: %s", ans.Err)
	}
	return ans, nil
}

// open starts a listener and returns its address.
func (p *relayProcess) open(cfg relayConfig) (string, error) {
	ans, err := p.ask(relayRequest{Open: &cfg})
	return ans.Addr, err
}

// close ends a listener and returns its counts.
func (p *relayProcess) close(addr string) (relayReport, error) {
	ans, err := p.ask(relayRequest{Close: addr})
	if err != nil {
		return relayReport{}, err
	}
	return *ans.Report, nil
}

func (p *relayProcess) stop() {
	p.in.Close()
	p.cmd.Wait()
	os.Remove(p.roots)
}

// selfSigned makes a certificate for the loopback address, and the PEM file that makes clients trust it.
func selfSigned() (tls.Certificate, string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, "", err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "relay.example"},
		NotBefore:             time.Unix(0, 0), // the fake clock of tests begins in 2000
		NotAfter:              time.Now().Add(24 * time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
		IsCA:                  true,
		DNSNames:              []string{"localhost"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, "", err
	}
	roots := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(roots), nil
}
