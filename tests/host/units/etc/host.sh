# The state of this host, besides that of its charon.
modprobe -a ipv6 sctp # each adds sysctls; the tests use both, and modules stay loaded
hostname a-host
ip link set lo up
ip netns add peer
ip link add own0 type veth peer name own0 netns peer
ip address add 192.0.2.1/24 dev own0
ip link set own0 up
ip -n peer address add 192.0.2.2/24 dev own0
ip -n peer link set own0 up
ip -n peer link set lo up
ip rule add fwmark 7 table 77 priority 700
ip -6 rule add fwmark 7 table 77 priority 700
ip route add 198.51.100.0/24 via 192.0.2.2 table 77
ip route add unreachable 203.0.113.0/24
ip -6 route add unreachable 2001:db8:77::/48
ip xfrm state add src 192.0.2.1 dst 192.0.2.9 proto esp spi 0x77 reqid 7 mode tunnel \
    aead 'rfc4106(gcm(aes))' 0x1111111111111111111111111111111111111111 128
ip xfrm policy add src 192.0.2.1/32 dst 198.51.100.9/32 dir out \
    tmpl src 192.0.2.1 dst 192.0.2.9 proto esp reqid 7 mode tunnel
ip xfrm policy add src 192.0.2.0/24 dst 203.0.113.7/32 dir out action block
mkdir /sys/fs/cgroup/own
sleep infinity &
echo $! >/sys/fs/cgroup/own/cgroup.procs
