// The driver: runs one peer once, in its own process, against its own listener.

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// driver runs peers against the relay's process.
type driver struct {
	relay  *relayProcess
	self   string // this program
	node   string // "" if there is no Node.js
	script string // nodemailer/peer.mjs
	noNode string // why node is ""
}

func newDriver() (*driver, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	d := &driver{self: self}
	if d.relay, err = startRelay(); err != nil {
		return nil, err
	}
	if err := d.findNode(); err != nil {
		d.node, d.noNode = "", err.Error()
	}
	return d, nil
}

func (d *driver) stop() { d.relay.stop() }

// findNode installs nodemailer beside its script, if node and npm are installed.
func (d *driver) findNode() error {
	node, err := exec.LookPath("node")
	if err != nil {
		return errors.New("node is not installed")
	}
	dir, err := filepath.Abs("nodemailer")
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "peer.mjs")); err != nil {
		return errors.New("nodemailer/peer.mjs is not below the working directory: run this in bench/")
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules", "nodemailer")); err != nil {
		npm := exec.Command("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
		npm.Dir = dir
		if out, err := npm.CombinedOutput(); err != nil {
			return fmt.Errorf("npm ci: %w: %s", err, bytes.TrimSpace(out))
		}
	}
	d.node, d.script = node, filepath.Join(dir, "peer.mjs")
	return nil
}

// outcome is the result of a run, as reported by both sides.
type outcome struct {
	Peer   string      `json:"peer"`
	Job    job         `json:"job"`
	Client result      `json:"client"`
	Relay  relayReport `json:"relay"`
	Err    string      `json:"err,omitempty"` // the run itself failed
}

// rate returns messages accepted per second.
func (o outcome) rate() float64 {
	if o.Client.WallNs == 0 || o.Err != "" {
		return 0
	}
	return float64(o.Client.Sent) / (float64(o.Client.WallNs) / 1e9)
}

func (o outcome) per(n int64) float64 { return float64(n) / float64(max(o.Client.Sent, 1)) }

// busy returns how much of one processor the relay needed.
func (o outcome) busy() float64 {
	return float64(o.Relay.CPU) / float64(max(o.Client.WallNs, 1))
}

// more is the additional input of nodemailer's script.
type more struct {
	job
	Header       string `json:"header"`
	Username     string `json:"username"`
	Password     string `json:"password"`
	WarmMessages int    `json:"warm_messages"`
}

// run runs a peer once.
func (d *driver) run(p *peer, cfg relayConfig, j job) outcome {
	o := outcome{Peer: p.name, Job: j}
	if p.run == nil && d.node == "" {
		o.Err = d.noNode
		return o
	}
	addr, err := d.relay.open(cfg)
	if err != nil {
		o.Err = err.Error()
		return o
	}
	j.Host, j.Port = hostPort(addr)
	if !j.Cold {
		warm := cfg
		warm.RTT = 0
		warmAddr, err := d.relay.open(warm)
		if err != nil {
			o.Err = err.Error()
			return o
		}
		defer d.relay.close(warmAddr)
		_, j.WarmPort = hostPort(warmAddr)
	}
	err = d.child(p, more{job: j}, &o.Client)
	report, closeErr := d.relay.close(addr)
	if err == nil {
		err = closeErr
	}
	o.Relay = report
	if err != nil {
		o.Err = err.Error()
	}
	return o
}

// patience is how long a run may take: far longer than any does.
const patience = 3 * time.Minute

// child runs a peer's process and reads its result.
func (d *driver) child(p *peer, m more, told any) error {
	m.Header, m.Username, m.Password, m.WarmMessages = header, username, password, warmMessages
	cmd := exec.Command(d.self, "peer")
	if p.run == nil {
		cmd = exec.Command(d.node, "--expose-gc", d.script)
	}
	arg, err := json.Marshal(m)
	if err != nil {
		return err
	}
	cmd.Args = append(cmd.Args, string(arg))
	// All clients trust the relay by the system's roots, since some take no TLS configuration.
	cmd.Env = append(os.Environ(), "SSL_CERT_FILE="+d.relay.roots, "SSL_CERT_DIR=/nonexistent", "NODE_EXTRA_CA_CERTS="+d.relay.roots)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	timer := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer timer.Stop()
	if err := cmd.Wait(); err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n")
		return fmt.Errorf("%w: %s", err, first)
	}
	return json.Unmarshal(stdout.Bytes(), told)
}

func hostPort(addr string) (string, int) {
	var port int
	i := strings.LastIndexByte(addr, ':')
	fmt.Sscan(addr[i+1:], &port)
	return addr[:i], port
}

// runCell runs every peer of a cell several times, alternating between peers, and keeps the run with each peer's median rate.
func (d *driver) runCell(c cell, progress func(string)) []outcome {
	runs := make([][]outcome, len(c.Peers))
	for rep := range max(c.Reps, 1) {
		for i, name := range c.Peers {
			p := peerNamed(name)
			if p == nil || rep >= c.reps(p) {
				continue
			}
			progress(name)
			runs[i] = append(runs[i], d.run(p, c.relay(), c.job(p)))
		}
	}
	var kept []outcome
	for _, r := range runs {
		if len(r) == 0 {
			continue
		}
		slices.SortFunc(r, func(a, b outcome) int {
			switch {
			case a.rate() < b.rate():
				return -1
			case a.rate() > b.rate():
				return 1
			}
			return 0
		})
		kept = append(kept, r[len(r)/2])
	}
	return kept
}
